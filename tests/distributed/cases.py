"""Ways to spread a model over processes, as data, and the training run that all of them must agree on.

A new parallelism adds its cases to `CASES`; what is compared, and with what, stays.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch.distributed.tensor import DTensor

from models.llama3.args import LlamaArgs
from models.llama3.model import Transformer
from models.llama3.plan import build_plan
from trainer.config.schema import JobConfig
from trainer.config.schema_parallel import ActivationCheckpointConfig, CompileConfig, ParallelismConfig
from trainer.config.schema_training import TrainingConfig
from trainer.distributed.fsdp import choose_accumulation, set_gradient_sync
from trainer.distributed.grad_norm import clip_grad_norm
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.weight_init import init_weights
from trainer.parallelize import parallelize

# No size is a multiple of 4, and the 6 rows of wk and wv leave the last of 4 ranks with none.
ARGS = LlamaArgs(dim=18, n_layers=4, n_heads=3, n_kv_heads=1, vocab_size=67, ffn_hidden_dim=26, max_seq_len=16)

GLOBAL_BATCH = 8
SEQ_LEN = 12
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
    microbatches: int = 1
    tied: bool = False
    tolerance: float = 1e-5
    """Largest relative error, in the 2-norm, of the loss, of each gradient and of each trained parameter."""

    @property
    def args(self) -> LlamaArgs:
        return dataclasses.replace(ARGS, tie_embeddings=self.tied)

    @property
    def config(self) -> JobConfig:
        return JobConfig(
            parallelism=ParallelismConfig(**self.parallelism),
            training=TrainingConfig(**{"mixed_precision_param": "float32", **self.training}),
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
    Case("fsdp2", 2),
    Case("fsdp4", 4),
    Case("fsdp2_always", 2, {"fsdp_reshard_after_forward": "always"}),
    Case("fsdp2_never", 2, {"fsdp_reshard_after_forward": "never"}),
    Case("fsdp4_prefetch2", 4, {"fsdp_prefetch": 2}),
    Case("fsdp4_tied", 4, tied=True),
    Case("fsdp2_tied_always", 2, {"fsdp_reshard_after_forward": "always"}, tied=True),
    Case("ddp2", 2, DDP2),
    Case("ddp4_tied", 4, DDP4, tied=True),
    Case("hsdp2x2", 4, HSDP),
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
    Case("fsdp2_ac_full", 2, activation_checkpoint={"mode": "full"}),
    Case("fsdp2_ac_every_second", 2, activation_checkpoint={"mode": "selective", "selective_ac_option": "2"}),
    Case("fsdp2_ac_op", 2, activation_checkpoint={"mode": "selective", "selective_ac_option": "op"}),
    Case("fsdp2_compile", 2, compile=EAGER_COMPILE),
    Case("fsdp2_compile_inductor", 2, compile={"enable": True}),
    Case("ddp2_compile", 2, DDP2, compile=EAGER_COMPILE),
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
    Case("fsdp2_bf16", 2, training=BF16, tolerance=4e-2),
    Case("fsdp2_bf16_reduce_bf16", 2, training={**BF16, "mixed_precision_reduce": "bfloat16"}, tolerance=4e-2),
    Case("ddp2_bf16", 2, DDP2, training=BF16, tolerance=4e-2),
    Case("hsdp2x2_bf16", 4, HSDP, training=BF16, tolerance=4e-2),
]


@dataclass(frozen=True)
class Outcome:
    """What a run gave: the loss and the gradient norm of each step, the first step's gradients, the last parameters."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]


def run_case(case: Case, device_type: str = "cpu") -> Outcome:
    """Train for `STEPS` steps on this process's part of the data, and return the whole tensors, on the CPU."""
    import torch.distributed as dist

    world_size = dist.get_world_size() if dist.is_initialized() else 1
    config = case.config
    dims = ParallelDims.from_config(config.parallelism, world_size)
    dims.build_mesh(device_type)
    device = torch.device(device_type, torch.cuda.current_device() if device_type == "cuda" else None)
    with torch.device("meta"):
        model = Transformer(case.args)
    parallelize(model, plan=build_plan(case.args), dims=dims, config=config)
    offloads = config.training.enable_cpu_offload
    init_weights(model, seed=SEED, device="cpu" if offloads else device, buffer_device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
    accumulation = choose_accumulation(model, parallelism=config.parallelism, training=config.training, device=device)
    losses, grad_norms, gradients = [], [], {}
    for step in range(STEPS):
        tokens, labels = (t.to(device) for t in make_batch(step))
        n_valid = (labels >= 0).sum()
        mine = slice(dims.dp_rank * GLOBAL_BATCH // dims.dp_degree, (dims.dp_rank + 1) * GLOBAL_BATCH // dims.dp_degree)
        total = torch.zeros((), device=device)
        microbatches = list(
            zip(tokens[mine].chunk(case.microbatches), labels[mine].chunk(case.microbatches), strict=True)
        )
        for i, (some_tokens, some_labels) in enumerate(microbatches):
            set_gradient_sync(
                model,
                i == len(microbatches) - 1,
                accumulation=accumulation,
                reshard_after_forward=config.parallelism.fsdp_reshard_after_forward,
            )
            loss = model(some_tokens, labels=some_labels, loss_fn=summed_loss) / n_valid
            loss.backward()
            total += loss.detach()
        if dist.is_initialized():
            dist.all_reduce(total, group=dims.loss_group())
        losses.append(total.item())
        if step == 0:
            gradients = {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        grad_norms.append(clip_grad_norm(model.parameters(), max_norm=0.5).item())
        optimizer.step()
        optimizer.zero_grad()
    return Outcome(losses, grad_norms, gradients, {name: _whole(p) for name, p in model.named_parameters()})


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


def summed_loss(hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    logits = hidden @ weight.t()
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100, reduction="sum")


def _whole(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "this parameter has no gradient"
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()
