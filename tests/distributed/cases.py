"""The training run that all ways to spread a model over processes must agree on, and settings of data parallelism alone.

A new parallelism adds its techniques to `table.py`. `CASES` has what the table does not; what is compared, and with what,
stays.
"""

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from models.common.attention import build_document_mask
from models.deepseek_v3.args import DeepSeekV3Args
from models.llama3.args import LlamaArgs
from models.registry import ModelSpec, get_model_spec
from tests.distributed.loop_experts import use_loops
from trainer.components.expert_balance import build_expert_balance
from trainer.components.loss import build_loss
from trainer.components.optimizer import build_optimizer
from trainer.components.passes import build_passes
from trainer.components.prediction_losses import PredictionLosses
from trainer.config.schema import JobConfig
from trainer.config.schema_parallel import ActivationCheckpointConfig, CompileConfig, ParallelismConfig
from trainer.config.schema_quantize import (
    FLOAT8_EXPERTS_CONVERTER,
    Float8GroupedMMConfig,
    Float8LinearConfig,
    QuantizeConfig,
    QuantizeGroupedMMConfig,
    QuantizeLinearConfig,
)
from trainer.config.schema_training import ModelConfig, OptimizerConfig, TrainingConfig
from trainer.distributed.grad_norm import clip_grad_norm
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.weight_init import init_weights
from trainer.low_precision.float8_training import build_float8_training
from trainer.parallelize import parallelize

# No size is a multiple of 4, and the 6 rows of wk and wv leave the last of 4 ranks with none.
ARGS = LlamaArgs(dim=18, n_layers=4, n_heads=3, n_kv_heads=1, vocab_size=67, ffn_hidden_dim=26, max_seq_len=16)

# As small, with all that a mixture can have. A bias that moves so fast changes which experts a token meets from step to step.
EXPERT_ARGS = DeepSeekV3Args(
    dim=24,
    n_layers=4,
    n_dense_layers=1,
    n_heads=4,
    vocab_size=67,
    hidden_dim=26,
    q_lora_rank=18,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    rope_scaling=None,
    n_experts=8,
    top_k=3,
    moe_hidden_dim=16,
    n_expert_groups=4,
    n_limited_groups=2,
    bias_update_speed=0.05,
    max_seq_len=16,
)

GLOBAL_BATCH = 16
SEQ_LEN = 16
STEPS = 3
SEED = 7


@dataclass(frozen=True)
class Case:
    """One way to run the same training. Keyword arguments are those of the config sections."""

    name: str
    world_size: int = 1
    parallelism: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    activation_checkpoint: dict[str, Any] = field(default_factory=dict)
    compile: dict[str, Any] = field(default_factory=dict)
    float8: dict[str, Any] | None = None
    """Settings of `quantize.linear.float8`, which is off without."""
    float8_experts: dict[str, Any] | None = None
    """The same of `quantize.grouped_mm.float8`."""
    microbatches: int = 1
    chunk_size: int = 7
    """Tokens in a chunk of the loss. The last chunk is a shorter one, which has a graph of its own where the loss is compiled."""
    tied: bool = False
    documents: bool = False
    """Whether sequences hold several documents, to which attention keeps."""
    base: Any = ARGS
    """Args of the model. The family is that of their class."""
    tolerance: float = 1e-5
    """Largest relative error, in the 2-norm, of the loss, of each gradient and of each trained parameter."""

    @property
    def args(self) -> Any:
        mask = "block_causal" if self.documents else "causal"
        ties = {"tie_embeddings": True} if self.tied else {}
        return dataclasses.replace(self.base, attn_mask_type=mask, **ties)

    @property
    def spec(self) -> ModelSpec:
        return get_model_spec("llama3" if isinstance(self.base, LlamaArgs) else "deepseek_v3")

    @property
    def config(self) -> JobConfig:
        parallelism = ParallelismConfig(**self.parallelism)
        model_parallel = parallelism.tensor_parallel_degree * parallelism.context_parallel_degree
        ranks_of_data = self.world_size // (model_parallel * parallelism.pipeline_parallel_degree)
        training: dict[str, Any] = {
            "mixed_precision_param": "float32",
            "seq_len": SEQ_LEN,
            "global_batch_size": GLOBAL_BATCH,
            "local_batch_size": GLOBAL_BATCH // ranks_of_data // self.microbatches,
        }
        float8 = QuantizeLinearConfig(float8=Float8LinearConfig(**(self.float8 or {})))
        experts = QuantizeGroupedMMConfig(float8=Float8GroupedMMConfig(**(self.float8_experts or {})))
        converters = [] if self.float8 is None else ["float8"]
        converters += [] if self.float8_experts is None else [FLOAT8_EXPERTS_CONVERTER]
        return JobConfig(
            model=ModelConfig(attn_mask_type=self.args.attn_mask_type, converters=converters),
            quantize=QuantizeConfig(linear=float8, grouped_mm=experts),
            parallelism=parallelism,
            training=TrainingConfig(**{**training, **self.training}),
            activation_checkpoint=ActivationCheckpointConfig(**{"mode": "none", **self.activation_checkpoint}),
            compile=CompileConfig(**self.compile),
        )


HSDP = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 2}
DDP2 = {"data_parallel_replicate_degree": 2, "data_parallel_shard_degree": 1}
DDP4 = {"data_parallel_replicate_degree": 4, "data_parallel_shard_degree": 1}
BF16 = {"mixed_precision_param": "bfloat16"}
EAGER_COMPILE = {"enable": True, "backend": "aot_eager"}

CASES = [
    Case("one_process"),
    Case("fsdp4", 4),
    Case("fsdp2_always", 2, {"fsdp_reshard_after_forward": "always"}),
    Case("fsdp2_never", 2, {"fsdp_reshard_after_forward": "never"}),
    Case("fsdp4_prefetch2", 4, {"fsdp_prefetch": 2}),
    Case("fsdp4_tied", 4, tied=True),
    Case("fsdp2_tied_always", 2, {"fsdp_reshard_after_forward": "always"}, tied=True),
    Case("ddp4_tied", 4, DDP4, tied=True),
    Case("hsdp2x2_tied", 4, HSDP, tied=True),
    *(
        Case(f"{name}_accumulate_{mode}", size, {**degrees, "fsdp_accumulation": mode}, microbatches=2)
        for name, size, degrees in (("fsdp2", 2, {}), ("hsdp2x2", 4, HSDP), ("ddp2", 2, DDP2))
        for mode in ("sharded", "unsharded")
    ),
    Case(
        "fsdp2_accumulate_unsharded_never",
        2,
        {"fsdp_accumulation": "unsharded", "fsdp_reshard_after_forward": "never"},
        microbatches=4,
    ),
    Case("fsdp2_compile_inductor", 2, compile={"enable": True}),
    Case(
        "fsdp2_compile_ac_op",
        2,
        compile=EAGER_COMPILE,
        activation_checkpoint={"mode": "selective", "selective_ac_option": "op"},
    ),
    Case("fsdp2_compile_ac_full", 2, compile=EAGER_COMPILE, activation_checkpoint={"mode": "full"}),
    Case(
        "fsdp4_everything",
        4,
        {"fsdp_accumulation": "sharded", "fsdp_prefetch": 1},
        microbatches=2,
        tied=True,
        activation_checkpoint={"mode": "full"},
        compile=EAGER_COMPILE,
    ),
    Case("fsdp2_offload", 2, training={"enable_cpu_offload": True}),
    # bf16 has 8 bits of mantissa, and errors of a dozen layers add up.
    Case("one_process_bf16", 1, training=BF16, tolerance=4e-2),
    Case("fsdp2_bf16_reduce_bf16", 2, training={**BF16, "mixed_precision_reduce": "bfloat16"}, tolerance=4e-2),
]


def build_parameter(value: Any, name: str, *, exhaustive: bool) -> Any:
    """Return a parameter of a test by its name. exhaustive: it runs with --all only."""
    return pytest.param(value, id=name, marks=[pytest.mark.exhaustive] if exhaustive else [])


def list_parameters(cases: Sequence[Any], *, exhaustive: Collection[str] = ()) -> list:
    """Return cases, which have a name and a world size, as parameters of a test, those of as many ranks together.

    exhaustive: names of those that run with --all only.
    """
    in_order = sorted(cases, key=lambda case: case.world_size)
    return [build_parameter(case, case.name, exhaustive=case.name in exhaustive) for case in in_order]


@dataclass(frozen=True)
class Outcome:
    """What a run gave: the loss and the gradient norm of each step, the first step's gradients, the last parameters, and the losses
    of multi-token prediction in the last step.
    """

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]
    float8: dict[str, list[float]] = field(default_factory=dict)
    """The last scales of float8 layers here, where they are remembered."""
    predictions: dict[str, float] = field(default_factory=dict)


def run_case(case: Case, device_type: str = "cpu") -> Outcome:
    """Train for `STEPS` steps on this process's part of the data, and return what it has of the whole tensors, on the CPU."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    config = case.config
    dims = ParallelDims.from_config(config.parallelism, world_size)
    dims.build_mesh(device_type)
    device = torch.device(device_type, torch.cuda.current_device() if device_type == "cuda" else None)
    with torch.device("meta"):
        model = case.spec.load_model_class()(case.args)
    stages = parallelize(model, plan=case.spec.build_plan(case.args), dims=dims, config=config)
    offloads = config.training.enable_cpu_offload
    init_weights(model, seed=SEED, device="cpu" if offloads else device, buffer_device=device)
    float8 = build_float8_training(
        model, converters=config.model.converters, quantize=config.quantize, dims=dims, device=device
    )
    loss_fn = build_loss(
        chunk_size=case.chunk_size, compilation=config.compile, parallelism=config.parallelism, dims=dims
    )
    passes = build_passes(
        model,
        stages,
        args=case.args,
        loss_fn=loss_fn,
        dims=dims,
        parallelism=config.parallelism,
        training=config.training,
        splits_backward=config.activation_checkpoint.mode == "none" and not config.compile.enable,
        device=device,
    )
    prediction_losses = build_prediction_losses(case, model, device, dims.loss_group())
    balance = build_expert_balance(model, args=case.args, dims=dims, device=device)
    # The program's default, and a quarter of an eager case's time less than op by op.
    optimizer = build_optimizer(model, section=OptimizerConfig(lr=1e-2, eps=1e-4, weight_decay=1e-2, beta2=0.999))
    pp_mesh = dims.mesh("pp") if dims.pp > 1 else None
    losses, grad_norms, gradients = [], [], {}
    for step in range(STEPS):
        batch = {name: tensor.to(device) for name, tensor in _make_named_batch(step, case.documents).items()}
        n_valid = (batch["labels"] >= 0).sum()
        total = torch.zeros((), device=device)
        prediction_losses.begin_step()
        microbatches = _deal(batch, case.microbatches, dims)
        for i, microbatch in enumerate(microbatches):
            total += passes.forward_backward(microbatch, n_valid, is_last=i == len(microbatches) - 1)
        counted = torch.stack([passes.count_labels(microbatch) for microbatch in microbatches]).sum()
        if dist.is_initialized():
            dist.all_reduce(total, group=dims.loss_group())
            dist.all_reduce(counted, group=dims.loss_group())
        assert counted == n_valid, "each label counts once"
        losses.append(total.item())
        predictions = prediction_losses.measure(loss=total, valid_tokens=n_valid)
        if step == 0:
            gradients = {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        grad_norms.append(clip_grad_norm(model.parameters(), max_norm=0.5, pp_mesh=pp_mesh).item())
        float8.before_update()
        balance.update(torch.zeros((), device=device))
        optimizer.step()
        float8.after_update()
        optimizer.zero_grad()
    history = {} if float8.history is None else float8.history.state_dict()
    scales = {name: scale.tolist() for name, scale in history.items() if name.endswith(".scale")}
    return Outcome(
        losses,
        grad_norms,
        gradients,
        _list_trained(model),
        float8=scales,
        predictions={key: x.item() for key, x in predictions.items()},
    )


def build_prediction_losses(
    case: Case, model: torch.nn.Module, device: torch.device, group: dist.ProcessGroup | None = None
) -> PredictionLosses:
    def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
        if dist.is_initialized():
            dist.all_reduce(values, group=group)
        return values

    return PredictionLosses(
        model,
        depth=getattr(case.args, "mtp_depth", 0),
        weight=getattr(case.args, "mtp_weight", 0.0),
        sum_over_ranks=sum_over_ranks,
        device=device,
    )


def run_reference(case: Case, device_type: str = "cpu") -> Outcome:
    """Train as plainly as can be: the bare model, the whole batch at once, the loss from all logits, in fp32."""
    with torch.device("meta"):
        model = case.spec.load_model_class()(case.args)
    init_weights(model, seed=SEED, device=device_type)
    use_loops(model)
    balance = build_expert_balance(model, args=case.args, dims=ParallelDims(1), device=torch.device(device_type))
    prediction_losses = build_prediction_losses(case, model, torch.device(device_type))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    losses, grad_norms, gradients = [], [], {}
    for step in range(STEPS):
        batch = {name: tensor.to(device_type) for name, tensor in _make_named_batch(step, case.documents).items()}
        tokens, labels = batch.pop("tokens"), batch.pop("labels")
        n_labels = (labels >= 0).sum()
        prediction_losses.begin_step()
        if batch:
            batch["mask"] = build_document_mask(batch["positions"].cpu(), device_type="cpu").to(device_type)
        loss = model(tokens, **batch, labels=labels, loss_fn=summed_loss) / n_labels
        loss.backward()
        losses.append(loss.item())
        predictions = prediction_losses.measure(loss=loss.detach(), valid_tokens=n_labels)
        if step == 0:
            gradients = {name: _whole(p.grad) for name, p in model.named_parameters()}
        grad_norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        balance.update(torch.zeros((), device=device_type))
        optimizer.step()
        optimizer.zero_grad()
    return Outcome(
        losses,
        grad_norms,
        gradients,
        _list_trained(model),
        predictions={key: x.item() for key, x in predictions.items()},
    )


def _list_trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what the steps changed: parameters, and the biases of routers."""
    biases = ((name, buffer) for name, buffer in model.named_buffers() if name.endswith("expert_bias"))
    return {name: _whole(tensor) for name, tensor in (*model.named_parameters(), *biases)}


def _make_named_batch(step: int, documents: bool) -> dict[str, torch.Tensor]:
    tokens, labels = make_batch(step)
    return {"tokens": tokens, "labels": labels} | ({"positions": make_positions()} if documents else {})


def _deal(batch: dict[str, torch.Tensor], n: int, dims: ParallelDims) -> list[dict[str, torch.Tensor]]:
    """Return this rank's sequences of the global batch, in `n` batches."""
    mine = slice(dims.dp_rank * GLOBAL_BATCH // dims.dp_degree, (dims.dp_rank + 1) * GLOBAL_BATCH // dims.dp_degree)
    parts = {name: tensor[mine].chunk(n) for name, tensor in batch.items()}
    return [dict(zip(parts, tensors, strict=True)) for tensors in zip(*parts.values(), strict=True)]


def make_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the global batch of a step: tokens and labels, both (batch, seq).

    Sequences have different numbers of labels, so that a mean of per-rank means is not the mean.
    """
    generator = torch.Generator().manual_seed(step)
    text = torch.randint(ARGS.vocab_size, (GLOBAL_BATCH, SEQ_LEN + 1), generator=generator)
    tokens, labels = text[:, :-1].contiguous(), text[:, 1:].clone()
    for row in range(GLOBAL_BATCH):
        labels[row, : row % 5] = -100
    return tokens, labels


def make_positions() -> torch.Tensor:
    """Return the positions of a batch whose sequences hold documents of different lengths, (batch, seq)."""
    lengths = [[1 + (row + i) % 7 for i in range(SEQ_LEN)] for row in range(GLOBAL_BATCH)]
    rows = [torch.cat([torch.arange(length) for length in row])[:SEQ_LEN] for row in lengths]
    return torch.stack(rows)


def summed_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The plain loss, from the output matrix."""
    return sum_cross_entropy(hidden @ weight.t(), labels)


def sum_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The plain loss. logits: (batch, seq, vocab), labels: (batch, seq)"""
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def _whole(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "this parameter has no gradient"
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()


def _get_relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return it in the 2-norm; 0 for tensors that are the same, such as the biases of experts that are all chosen, which stay 0."""
    return 0.0 if torch.equal(actual, expected) else ((actual - expected).norm() / expected.norm()).item()


def assert_equal_outcomes(outcomes: list[Outcome], expected: Outcome, tolerance: float) -> None:
    """Every rank's losses and norms, and the gradients and parameters that it has, are those of one process.

    tolerance: largest relative error, in the 2-norm. Stages of a pipeline have different parameters: together, all.
    """
    seen: dict[str, set[str]] = {"gradients": set(), "parameters": set()}
    for rank, actual in enumerate(outcomes):
        assert actual.losses == pytest.approx(expected.losses, rel=tolerance), f"loss on rank {rank}"
        assert actual.grad_norms == pytest.approx(expected.grad_norms, rel=tolerance), f"norm on rank {rank}"
        assert actual.predictions == pytest.approx(expected.predictions, rel=tolerance), f"depths on rank {rank}"
        for kind, names_seen in seen.items():
            tensors, references = getattr(actual, kind), getattr(expected, kind)
            errors = {name: _get_relative_error(tensors[name], references[name]) for name in tensors}
            wrong = {name: error for name, error in errors.items() if not error <= tolerance}
            assert not wrong, f"{kind} on rank {rank}"
            names_seen.update(tensors)
    assert seen == {"gradients": set(expected.gradients), "parameters": set(expected.parameters)}
