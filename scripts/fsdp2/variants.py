"""Ways to a sharded model and its optimizer, for scripts/fsdp2_benchmark.py: the same network, weights, data and optimizer in each."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.optim import AdamW

from models.registry import get_model_spec
from scripts.fsdp2.claims import ACCELERATE, AFTER, FIXED, NOT_FIXED, TRAINER
from trainer.components.follow_parameters import follow_parameters
from trainer.components.optimizer import build_optimizer
from trainer.config.schema import JobConfig
from trainer.config.schema_parallel import ActivationCheckpointConfig
from trainer.config.schema_training import OptimizerConfig, TrainingConfig
from trainer.distributed.parallel_dims import ParallelDims
from trainer.distributed.weight_init import init_weights
from trainer.parallelize import parallelize

_OPTIMIZER = OptimizerConfig(lr=3e-4, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
_SEED = 0


@dataclass(frozen=True)
class Settings:
    """What all variants have in common."""

    model: str
    flavor: str
    device: str
    """cuda or cpu."""
    steps: int
    batch_size: int
    """Sequences of each rank."""
    seq_len: int
    """Tokens."""

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of forward and backward; parameters, reductions and the optimizer are in float32. CPUs compute slowly in bfloat16."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    def get_args(self) -> Any:
        """Return the sizes of the network."""
        return get_model_spec(self.model).get_args(self.flavor)


@dataclass
class Built:
    """A model that is ready to be trained."""

    model: nn.Module
    optimizer: Any
    backward: Callable[[Tensor], None]
    """Takes the mean loss over this rank's tokens."""


def get_obstacle(variant: str, settings: Settings) -> str | None:
    """Return why a variant cannot be measured here, or None."""
    if variant != ACCELERATE:
        return None
    if importlib.util.find_spec("accelerate") is None:
        return "accelerate is not installed"
    return "accelerate shards on GPUs only" if settings.device == "cpu" else None


def build(variant: str, settings: Settings, device: torch.device) -> Built:
    """Build a variant by its name, one of `scripts.fsdp2.claims.VARIANTS`. Collective."""
    return _BUILDERS[variant](settings, device)


def _build_whole_model(settings: Settings, device: torch.device) -> nn.Module:
    """Return the network with all its float32 weights on this device, as someone's own loop does before it shards."""
    with torch.device("meta"):
        model = get_model_spec(settings.model).load_model_class()(settings.get_args())
    init_weights(model, seed=_SEED, device=device)
    return model.train()


def _get_policy(settings: Settings) -> MixedPrecisionPolicy:
    # The rotary tables are inputs of blocks in some networks, and stay in float32.
    return MixedPrecisionPolicy(
        param_dtype=settings.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def _shard(model: Any, settings: Settings) -> None:
    for block in model.layers.values():
        fully_shard(block, mp_policy=_get_policy(settings))
    fully_shard(model, mp_policy=_get_policy(settings))


def _build_adamw(model: nn.Module, device: torch.device) -> AdamW:
    section = _OPTIMIZER
    return AdamW(
        model.parameters(),
        lr=section.lr,
        betas=(section.beta1, section.beta2),
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=True,
    )


def _build_after(settings: Settings, device: torch.device) -> Built:
    model = _build_whole_model(settings, device)
    _shard(model, settings)
    return Built(model, _build_adamw(model, device), Tensor.backward)


def _build_not_fixed(settings: Settings, device: torch.device) -> Built:
    model = _build_whole_model(settings, device)
    optimizer = _build_adamw(model, device)
    _shard(model, settings)
    return Built(model, optimizer, Tensor.backward)


def _build_fixed(settings: Settings, device: torch.device) -> Built:
    model = _build_whole_model(settings, device)
    optimizer = _build_adamw(model, device)
    with follow_parameters(model, optimizer):
        _shard(model, settings)
    return Built(model, optimizer, Tensor.backward)


def _build_trainer(settings: Settings, device: torch.device) -> Built:
    """The trainer's steps: shard on the meta device, then weights, then the optimizer. No rank ever has the whole model."""
    config = JobConfig(
        optimizer=_OPTIMIZER,
        training=TrainingConfig(mixed_precision_param="bfloat16" if settings.device == "cuda" else "float32"),
        activation_checkpoint=ActivationCheckpointConfig(mode="none"),
    )
    spec, args = get_model_spec(settings.model), settings.get_args()
    dims = ParallelDims.from_config(config.parallelism, dist.get_world_size())
    dims.build_mesh(device.type)
    with torch.device("meta"):
        model = spec.load_model_class()(args)
    parallelize(model, plan=spec.build_plan(args), dims=dims, config=config)
    init_weights(model, seed=_SEED, device=device)
    optimizer = build_optimizer(model, section=config.optimizer)
    # Gradients are summed there, and averaged by FSDP2 itself.
    return Built(model.train(), optimizer, lambda loss: (loss / dist.get_world_size()).backward())


def _build_accelerate(settings: Settings, device: torch.device) -> Built:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    model: Any = _build_whole_model(settings, device)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        mixed_precision_policy=_get_policy(settings),
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=[type(next(iter(model.layers.values()))).__name__],
        cpu_ram_efficient_loading=False,
    )
    accelerator = Accelerator(fsdp_plugin=plugin, mixed_precision="no")
    model, optimizer = accelerator.prepare(model, _build_adamw(model, device))
    return Built(model, optimizer, accelerator.backward)


_BUILDERS = {
    AFTER: _build_after,
    NOT_FIXED: _build_not_fixed,
    FIXED: _build_fixed,
    TRAINER: _build_trainer,
    ACCELERATE: _build_accelerate,
}
