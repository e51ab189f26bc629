"""The training loop. `Trainer` builds the parts of a run from its configuration and takes its steps."""

import contextlib
import dataclasses
import logging
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.common.attention import attention_kernels
from trainer.build_model import BuiltModel, build_model
from trainer.build_passes import build_run_passes
from trainer.components.attention_report import log_attention_kernel
from trainer.components.checkpoint import CheckpointManager
from trainer.components.data.build import build_dataloader, build_validation_loader
from trainer.components.data.mixture import measure_sources
from trainer.components.determinism import set_determinism
from trainer.components.expert_balance import build_expert_balance
from trainer.components.garbage_collection import GarbageCollection
from trainer.components.hardware import use_device
from trainer.components.hf_checkpoint import build_hugging_face
from trainer.components.launch import Launch
from trainer.components.lr_scheduler import build_lr_scheduler
from trainer.components.metrics import MetricsLogger, Workload
from trainer.components.nonfinite import NonFiniteError, RollBackError, build_nonfinite_guard
from trainer.components.optimizer import build_optimizer
from trainer.components.passes import Passes, sum_of
from trainer.components.poisoned import PoisonedBatches
from trainer.components.prediction_losses import PredictionLosses
from trainer.components.profiling import build_profiler
from trainer.components.stopping import build_stopper
from trainer.components.stragglers import Stragglers
from trainer.components.tokenizer import build_tokenizer
from trainer.components.train_state import TrainState
from trainer.components.validation import Validator
from trainer.config.changes import describe_sections, describe_settings
from trainer.config.schema import JobConfig
from trainer.distributed.grad_norm import clip_grad_norm
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.process_group import check_same_on_all_ranks, init_process_group, open_store, set_timeouts
from trainer.distributed.startup_probe import run_startup_probe
from trainer.distributed.stop_signals import StopSignals
from trainer.distributed.watchdog import Watchdog
from trainer.distributed.weight_init import init_weights
from trainer.low_precision.float8_training import build_float8_training

logger = logging.getLogger(__name__)


class Trainer(AbstractContextManager):
    """One run: its parts, and the loop over steps. Use it in a `with` statement, which closes what the parts hold open."""

    def __init__(self, config: JobConfig, launch: Launch, watchdog: Watchdog, signals: StopSignals) -> None:
        """Build all parts. Collective: every rank calls it. signals: what asks this process to stop."""
        self.watchdog = watchdog
        self.config = config
        self.launch = launch
        self.dump_folder = Path(config.job.dump_folder)
        self.seed = config.debug.seed or 0
        self.nonfinite = build_nonfinite_guard(
            training=config.training, streams=config.data.streaming, dump_folder=self.dump_folder, rank=launch.rank
        )
        self.state = TrainState(nonfinite=self.nonfinite)
        self.dims = ParallelDims.from_config(config.parallelism, launch.world_size)
        self.device = use_device(launch.local_rank)
        set_determinism(debug=config.debug, seed=self.seed, rank=launch.rank)

        store = open_store(comm=config.comm, rank=launch.rank, world_size=launch.world_size, watchdog=watchdog)
        # Token files are made on first use, which can take longer than a collective may: hence before the process group.
        with signals.interrupting():
            self.tokenizer = build_tokenizer(config.model.hf_assets_path)
            self.dataloader = self._build_dataloader()
            self.validation_loader = self._build_validation_loader()
        init_process_group(
            store,
            comm=config.comm,
            device_type=self.device.type,
            dump_folder=self.dump_folder,
            rank=launch.rank,
            world_size=launch.world_size,
            needs_cpu_backend=config.training.enable_cpu_offload or config.checkpoint.async_mode != "disabled",
        )
        self.stopper = build_stopper(signals=signals, ends_at=launch.ends_at, device=self.device)
        self.dims.build_mesh(self.device.type)
        self._check_same_on_all_ranks()
        if config.comm.startup_probe_seconds and launch.world_size > 1:
            run_startup_probe(config.comm.startup_probe_seconds, self.device)
        self.nonfinite.poisoned = PoisonedBatches(self.dump_folder, self.dataloader)
        self.stragglers = Stragglers(device=self.device, threshold=config.metrics.straggler_threshold)

        built = self._build_model()
        self.model_args, self.model = built.args, built.model
        self.float8 = build_float8_training(
            self.model, converters=config.model.converters, quantize=config.quantize, dims=self.dims, device=self.device
        )
        self.passes = self._build_passes(built)
        self.optimizers = build_optimizer(self.model, section=config.optimizer, all_names=built.names)
        self.expert_balance = build_expert_balance(
            self.model,
            args=self.model_args,
            dims=self.dims,
            device=self.device,
            force_load_balance=config.debug.moe_force_load_balance,
        )
        self.prediction_losses = PredictionLosses(
            self.model,
            depth=getattr(self.model_args, "mtp_depth", 0),
            weight=getattr(self.model_args, "mtp_weight", 0.0),
            sum_over_ranks=self._sum_over_ranks,
            device=self.device,
        )
        self.lr_scheduler = build_lr_scheduler(
            self.optimizers, section=config.lr_scheduler, steps=config.training.steps
        )
        self.checkpointer = self._build_checkpointer()
        self.metrics = self._build_metrics()
        self.validator = self._build_validator()
        self.profiler = build_profiler(
            section=config.profiling, dump_folder=self.dump_folder, rank=launch.rank, device=self.device
        )
        self.garbage_collection = GarbageCollection(freq=config.training.gc_freq, debug=config.training.gc_debug)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close what the parts hold open. After an error the process group is left alone: other ranks may not come along."""
        if kind is not None and issubclass(kind, NonFiniteError):
            # All ranks stop at the same step. A save in the background is of a step before: it is worth waiting for.
            with contextlib.suppress(RuntimeError):  # it has told why it failed
                self.checkpointer.close()
        self.checkpointer.release_folder()
        self.garbage_collection.close()
        self.dataloader.close()
        if self.validation_loader is not None:
            self.validation_loader.close()
        self._report_saves()
        self.metrics.close()
        if kind is None:
            self.watchdog.close()  # it needs the store of the process group
            dist.destroy_process_group()

    # --- the loop ---

    def train(self) -> str:
        """Resume if there is something to resume from, then train up to `training.steps`.

        Returns: why it stopped before that, in a word or two; empty if it did not.

        Raises:
            NonFiniteError: loss or gradient was not finite, and the policy says to stop.
        """
        config = self.config
        with attention_kernels(self.device.type):
            # Outside of the run's profiler, since it has one of its own.
            log_attention_kernel(
                self.model_args, model=config.model, training=config.training, parallelism=config.parallelism, device=self.device
            )  # fmt: skip
            if config.checkpoint.create_seed_checkpoint:
                self.checkpointer.save_seed()
                return ""
            with self.profiler:
                self.checkpointer.load()
                self._take_steps()
        self._finish()
        return self.stopper.reason if self.state.step < self.config.training.steps else ""

    def _take_steps(self) -> None:
        """Take the steps that are left, with what is due after each."""
        steps = self.config.training.steps
        state = self.state
        self._first_step = state.step
        self.metrics.begin(step=state.step, tokens_seen=state.tokens_seen, elapsed_seconds=state.elapsed_seconds)
        if self.state.step >= steps:
            logger.info(
                "nothing is left to do: step %d is done, and training.steps = %d. Raise it to go on, or choose another "
                "job.dump_folder to begin anew", self.state.step, steps,
            )  # fmt: skip
        if self.launch.is_restart:
            self.nonfinite.refuse_hopeless(self.dataloader.sequences)
        stops = self.stopper.agree()
        while self.state.step < steps and not stops:
            try:
                self._take_step()
                if self.stopper.reason:
                    self._settle_nonfinite()  # here, where it may ask to roll back
            except RollBackError as error:
                self._roll_back(error)
            stops = bool(self.stopper.reason)
        self._settle_nonfinite()
        if stops:
            self._save_before_stop()

    def _take_step(self) -> None:
        """Take a step, or pass over one whose batch is known to be bad, and do what is due after it."""
        if self.nonfinite.passes_over(self.dataloader.sequences):
            self._first_step += self.state.step == self._first_step  # the first one that trains is still to come
            self._pass_over_step()
        else:
            self.train_step()
        if self.state.step == self._first_step + 1:
            # From here on no collective waits for compilation (but in the first validation), whatever the step that the run began at.
            self._set_timeouts(self.config.comm.train_timeout_seconds)
            self.stopper.agree()
        self._after_step()

    def train_step(self) -> None:
        """Take one optimizer step: all its microbatches, clipping, and the update unless something is not finite."""
        self._come_to("data")
        self.stragglers.begin_step()
        self.optimizers.zero_grad()
        self.float8.begin_step(self.state.step + 1, is_logged=self.metrics.should_log(self.state.step + 1))
        self.prediction_losses.begin_step()
        position, sequence = self.dataloader.position(), self.dataloader.sequences
        batches = [self._next_batch() for _ in range(self.dataloader.microbatches_per_step)]
        counts = sum_of([self.passes.count_labels(batch) for batch in batches])
        self.stragglers.meet_others()
        valid_tokens = self._sum_over_ranks(counts)
        losses = []
        for batch in batches:
            self._come_to("forward and backward")
            losses.append(self.passes.forward_backward(batch, valid_tokens, is_last=batch is batches[-1]))
        self._come_to("update")
        loss, wishes = self._sum_losses(sum_of(losses))
        pp_mesh = self.dims.mesh("pp") if self.dims.pp > 1 else None
        grad_norm = clip_grad_norm(self.model.parameters(), self.config.training.max_norm, pp_mesh=pp_mesh)

        self._settle_nonfinite()
        self.stopper.end_step(wishes)
        self.state.step += 1
        skip = self.nonfinite.judge(self.state.step, loss=loss, grad_norm=grad_norm, batch=position, sequence=sequence)
        self.checkpointer.maybe_wait_for_staging()
        self.expert_balance.update(skip)
        lr = self.lr_scheduler.get_last_lr()[0]
        measured = self.float8.before_update()
        extra: dict[str, float | Tensor] = {}
        if self.metrics.should_log(self.state.step):
            predictions = self.prediction_losses.measure(loss=loss, valid_tokens=valid_tokens)
            extra = {**self._get_further_values(), **measured, **predictions}
            self.stragglers.gather()
        self.optimizers.step(skip)
        self.float8.after_update()
        self.lr_scheduler.step()
        self.state.tokens_seen = self.metrics.tokens_seen
        self.metrics.log(self.state.step, loss=loss, grad_norm=grad_norm, lr=lr, extra=extra)

    def _pass_over_step(self) -> None:
        """Count a step and use up its batch, without an update: as a step that is skipped for what comes of it, and that is known."""
        self._come_to("data")
        for _ in range(self.dataloader.microbatches_per_step):
            self._next_batch()
        self._settle_nonfinite()
        self.stopper.settle()
        self.state.step += 1
        self.nonfinite.pass_over(self.state.step)
        lr = self.lr_scheduler.get_last_lr()[0]
        self.lr_scheduler.step()
        self.state.tokens_seen = self.metrics.tokens_seen
        self.metrics.log(self.state.step, loss=math.nan, grad_norm=math.nan, lr=lr)
        self.metrics.event("skip", self.state.step, skipped=self.nonfinite.total_skipped)

    def _roll_back(self, error: RollBackError) -> None:
        """Go back to the last checkpoint. The batch that failed is passed over on the way."""
        logger.warning("%s. Rolling back", error, extra={"same_on_all_ranks": True})
        failed = self.state.step
        self.watchdog.progress(failed, "checkpoint")
        self.expert_balance.forget()
        self.float8.forget()
        if not self.checkpointer.load_newest():
            raise NonFiniteError(f"{error}. There is no checkpoint yet to go back to") from error
        self.metrics.rewind(self.state.step, tokens_seen=self.state.tokens_seen, failed_step=failed)

    def _come_to(self, phase: str) -> None:
        """Tell the watchdog of progress within the step that is under way."""
        self.watchdog.progress(self.state.step + 1, phase)

    def _get_further_values(self) -> dict[str, float | Tensor]:
        """Return what the curves show beside loss, norm and speed. The learning rates are those of the coming update."""
        rates = self.optimizers.get_learning_rates()
        lrs = {f"lr/{name}": rate for name, rate in rates.items()} if len(rates) > 1 else {}
        return {**measure_sources(self.dataloader.describe()), **lrs, **self.expert_balance.measure()}

    def _next_batch(self) -> dict[str, Tensor]:
        """Return this rank's next microbatch, on its device."""
        batch = self.dataloader.next_batch()
        self.metrics.add_data_wait(self.dataloader.take_wait_seconds())
        self.metrics.add_tokens(batch["tokens"].numel())
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}

    def _sum_over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks whose losses add up. Nothing waits for it on the host."""
        total = value.detach().clone()
        dist.all_reduce(total, group=self.dims.loss_group())
        return total

    def _sum_losses(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sum of the losses, and that of the wishes to stop, which go along. Nothing waits for it on the host."""
        # Ranks of tensor parallelism have the same loss, and may have different wishes.
        values = torch.cat([loss.detach().reshape(1) / self.dims.tp, self.stopper.get_wishes()])
        dist.all_reduce(values, group=self.dims.loss_group() if self.dims.tp == 1 else None)
        return values[0], values[1:]

    def _settle_nonfinite(self) -> None:
        """Act on whether the step before was skipped, by now known to the host without a wait."""
        if self.nonfinite.settle():
            self.metrics.event("skip", self.state.step, skipped=self.nonfinite.total_skipped)

    def _after_step(self) -> None:
        """Do what is due between two steps: validation, checkpoint, traces, garbage collection."""
        step, last = self.state.step, self.state.step == self.config.training.steps
        if self.stopper.reason and not last:
            return
        if self.validator is not None and self.validator.should_run(step, last=last):
            self.watchdog.progress(step, "validation")
            self._validate(self.validator)
        if self.checkpointer.should_save(step, last):
            with self._saving():
                self.checkpointer.save(step, last)
            self.stopper.agree()
        self._report_saves()
        # Only then: a pause waits for the device, and would leave it idle between any two steps.
        with self.metrics.pause() if self.profiler.is_due(step) else contextlib.nullcontext():
            self.profiler.step(step)
        self.garbage_collection.step(step)

    def _report_saves(self) -> None:
        """Note the saves that have ended, in the background too."""
        reports = self.checkpointer.take_reports()
        for report in reports:
            self.stopper.note_save(report.seconds)
        self.metrics.report_saves(self.state.step, reports)

    def _set_timeouts(self, seconds: float) -> None:
        """Say how long a collective may take from now on. Collective."""
        set_timeouts(self.dims, seconds)
        self.watchdog.set_timeout(seconds)

    def _validate(self, validator: Validator) -> None:
        is_first = not validator.has_run
        if is_first:
            # It compiles graphs of its own: stages of a pipeline one after the other, and the last waits for all.
            self._set_timeouts(self.config.comm.init_timeout_seconds)
        with self.metrics.pause():
            result = validator.run()
            self.passes.reshard()
            self.stopper.agree()
        if is_first:
            self._set_timeouts(self.config.comm.train_timeout_seconds)
        if result is not None:
            loss, seconds = result
            self.metrics.event("validation", self.state.step, loss=loss, seconds=seconds)

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """What goes around a save."""
        # A checkpoint of a step that was not finite would be resumed from.
        self._settle_nonfinite()
        self.watchdog.progress(self.state.step, "checkpoint")
        with self.metrics.pause():
            self.state.elapsed_seconds = self.metrics.agree_on_elapsed_seconds()
            yield

    def _save_before_stop(self) -> None:
        """Save the last step that was taken, so that the run can go on from it."""
        with self._saving():
            self.checkpointer.save_now(self.state.step)

    def _finish(self) -> None:
        self.checkpointer.close()
        self.float8.finish()
        self._report_saves()
        section = self.config.checkpoint
        self.metrics.close(checkpoint=self.dump_folder / section.folder if section.enable else None)

    # --- the parts ---

    def _build_dataloader(self) -> Any:
        return build_dataloader(training=self.config.training, seed=self.seed, **self._get_loader_options())

    def _get_loader_options(self) -> dict[str, Any]:
        """Return what the loaders of training and of validation have in common."""
        return {
            "data": self.config.data,
            "attn_mask_type": self.config.model.attn_mask_type,
            "tokenizer": self.tokenizer,
            "dp_rank": self.dims.dp_rank_of(self.launch.rank),
            "dp_degree": self.dims.dp_degree,
            "device_type": self.device.type,
        }

    def _check_same_on_all_ranks(self) -> None:
        """Check what each rank found out for itself, from files that hosts may have of their own."""
        values = describe_sections(self.config)
        schedule_file = self.config.parallelism.pipeline_parallel_schedule_csv
        if self.dims.pp > 1 and schedule_file:
            values[f"the pipeline schedule in {schedule_file}"] = Path(schedule_file).read_text(encoding="utf-8")
        values["the order of the training data"] = self.dataloader.fingerprint
        if self.validation_loader is not None:
            values["the order of the validation data"] = self.validation_loader.fingerprint
        check_same_on_all_ranks(values)

    def _build_validation_loader(self) -> Any:
        section = self.config.validation
        return build_validation_loader(validation=section, **self._get_loader_options()) if section.enable else None

    def _build_model(self) -> BuiltModel:
        """Build the network on the meta device, spread it over the ranks, and give it its first weights."""
        config = self.config
        built = build_model(config, self.dims)
        weight_device = torch.device("cpu") if config.training.enable_cpu_offload else self.device
        init_weights(built.model, seed=self.seed, device=weight_device, buffer_device=self.device)
        built.model.train()
        logger.info("%s %s: %s parameters", config.model.name, config.model.flavor, f"{built.args.n_params():,}")
        return built

    def _build_passes(self, built: BuiltModel) -> Passes:
        return build_run_passes(self.config, built, dims=self.dims, device=self.device)

    def _build_checkpointer(self) -> CheckpointManager:
        section = self.config.checkpoint
        states: dict[str, Any] = {
            "model": self.model,
            "optimizer": self.optimizers,
            "lr_scheduler": self.lr_scheduler,
            "dataloader": self.dataloader,
            "train_state": self.state,
            **self.float8.states(),
        }
        batch = self.dataloader.shape.global_batch_size
        settings = describe_settings(self.config, self.model_args, global_batch_size=batch)
        folder = self.dump_folder / section.folder
        hugging_face = build_hugging_face(
            section, model=self.config.model, args=self.model_args, folder=folder, tokenizer=self.tokenizer
        )
        return CheckpointManager(
            states, section=section, folder=folder, settings=settings, hugging_face=hugging_face, is_restart=self.launch.is_restart
        )  # fmt: skip

    def _build_metrics(self) -> MetricsLogger:
        config, seq_len = self.config, self.config.training.seq_len
        return MetricsLogger(
            section=config.metrics,
            dump_folder=self.dump_folder,
            rank=self.launch.rank,
            device=self.device,
            total_steps=config.training.steps,
            workload=Workload(
                world_size=self.launch.world_size,
                dp_degree=self.dims.dp_degree,
                flops_per_token=self.model_args.flops_per_token(seq_len, "causal"),
                flops_per_token_full=self.model_args.flops_per_token(seq_len, "full"),
            ),
            wandb_variables=self.launch.wandb_variables,
            run_config=dataclasses.asdict(config),
            stragglers=self.stragglers,
        )

    def _build_validator(self) -> Validator | None:
        loader = self.validation_loader
        if loader is None:
            return None

        def loss_of_batch(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            batch = {name: tensor.to(self.device, non_blocking=True) for name, tensor in batch.items()}
            return self.passes.evaluate(batch)

        return Validator(
            model=self.model,
            batches=loader.epoch_batches,
            loss_of_batch=loss_of_batch,
            sum_over_ranks=self._sum_over_ranks,
            should_stop=self.stopper.poll,
            freq=self.config.validation.freq,
        )
