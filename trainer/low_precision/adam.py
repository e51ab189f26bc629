"""Adam and AdamW whose moments take 4, 2, 1 or half a byte a value, on shards of any placement.

An update is one pass over memory, whatever the moments are stored as: one Triton kernel a parameter on CUDA, plain torch
elsewhere. Parameters, gradients and all arithmetic are as in `torch.optim.AdamW`; moments are stored as `moments` says. (The
fused kernels of torch up to 2.11 want moments of the parameter's dtype; torchao's optimizers compile a graph for each
shape, keep states that checkpoints cannot read without their classes, and cannot skip a step on the device.)
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from trainer.config.errors import UserError
from trainer.low_precision.moments import (
    Kind,
    Moment,
    MomentFormat,
    choose_block,
    codes_per_byte,
    draw_bits,
    get_table,
    has_scales,
    read,
    write,
)

_TILE_VALUES = 1024
"""Values that one program of the kernel updates."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


class LowPrecisionAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba, arXiv 1412.6980), or AdamW (arXiv 1711.05101), with moments in low precision.

    State of a parameter: `step`, 0-dim fp32 on its device; for each moment either `exp_avg`, like the parameter, fp32 or bf16; or
    `exp_avg_codes`, uint8, and `exp_avg_scale`, fp32, with as many rows as the parameter, placed as it is. Tensors with fewer
    than two dims, small ones, and such whose last dim makes no blocks keep moments in fp32 where the format has blocks.

    decoupled: weight decay as in AdamW; else it is added to the gradient.
    """

    found_inf: Tensor | None = None
    """Set while a step may have to be skipped: 0-dim fp32, 1.0 to skip. Read on the device."""

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        moments: MomentFormat,
        decoupled: bool = True,
    ) -> None:
        """Raises ValueError where the kernel cannot run on a parameter's device."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._formats: tuple[Kind, Kind] = (moments.exp_avg, moments.exp_avg_sq)
        self._decoupled = decoupled
        for device in {parameter.device for group in self.param_groups for parameter in group["params"]}:
            _check_device(device, self._formats)
        # Of the random bits: the same on all ranks that have replicas of a parameter.
        self._salts = {p: i for i, p in enumerate(p for group in self.param_groups for p in group["params"])}

    def make_state(self, parameter: Tensor) -> None:
        """Give a parameter moments of zero."""
        state: dict[str, Tensor] = {"step": torch.zeros((), dtype=torch.float32, device=parameter.device)}
        for name, kind in zip(_MOMENTS, self._formats, strict=True):
            state.update(_make_moment(name, kind, parameter))
        self.state[parameter] = state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient, unless `found_inf` says not to."""
        assert closure is None, "LowPrecisionAdam takes no closure"
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for parameter in parameters:
                if parameter not in self.state:
                    self.make_state(parameter)
            if parameters:
                self._update_group(parameters, group)

    def _update_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        steps = [self.state[parameter]["step"] for parameter in parameters]
        skip = self.found_inf
        if skip is not None and not skip.is_cuda:
            if bool(skip):
                return
            skip = None
        # A step that is skipped counts for nothing.
        taken_now = torch.ones_like(steps[0]) if skip is None else 1 - skip
        torch._foreach_add_(steps, [taken_now] * len(steps))  # for a tensor alone the host would wait
        taken = torch.stack(steps)
        # expm1: 1 - beta ** step would lose digits in fp32.
        corrections = torch.stack([-torch.expm1(taken * math.log(beta)) if beta else torch.ones_like(taken) for beta in group["betas"]], dim=1)  # fmt: skip
        decay = group["weight_decay"]
        scalars = {
            "lr": group["lr"],
            "keep": 1 - group["lr"] * decay if self._decoupled else 1.0,
            "l2": 0.0 if self._decoupled else decay,
            "new1": 1 - group["betas"][0],
            "new2": 1 - group["betas"][1],
            "eps": group["eps"],
        }
        for parameter, step, correction in zip(parameters, steps, corrections.unbind(), strict=True):
            values, grad = _local(parameter), _local_gradient(parameter)
            if not values.numel():
                continue  # this rank has no rows of it
            assert values.is_contiguous(), "moments lie in memory as their parameter does"
            moments = (self._get_moment(parameter, 0), self._get_moment(parameter, 1))
            update = _launch if values.is_cuda else _update_plainly
            update(values, grad, *moments, step, correction, skip, salt=self._salts[parameter], **scalars)

    def _get_moment(self, parameter: Tensor, index: int) -> Moment:
        state, name, kind = self.state[parameter], _MOMENTS[index], self._formats[index]
        if name in state:
            plain: Kind = "bfloat16" if state[name].dtype == torch.bfloat16 else "float32"
            return Moment(plain, _local(state[name]), None, is_signed=index == 0)
        return Moment(kind, _local(state[f"{name}_codes"]), _local(state[f"{name}_scale"]), is_signed=index == 0)


def _check_device(device: torch.device, kinds: tuple[Kind, Kind]) -> None:
    if device.type != "cuda":
        return
    capability = torch.cuda.get_device_capability(device)
    if "float8" in kinds and capability < (8, 9):
        name = torch.cuda.get_device_name(device)
        raise UserError(
            f"moments in float8 need a GPU of compute capability 8.9 or later, and {name} has "
            f"{capability[0]}.{capability[1]}. Use optimizer.name = AdamW8bit, or optimizer.state_dtype = bfloat16"
        )


def _make_moment(name: str, kind: Kind, parameter: Tensor) -> dict[str, Tensor]:
    """Return the tensors of a moment that is zero."""
    if not has_scales(kind):
        return {name: torch.zeros_like(parameter, dtype=getattr(torch, kind))}
    block = choose_block(kind, parameter.shape, _count_shards(parameter, parameter.ndim - 1))
    if block is None:
        return {name: torch.zeros_like(parameter, dtype=torch.float32)}
    return {
        f"{name}_codes": _make_like(parameter, shorter=codes_per_byte(kind), dtype=torch.uint8),
        f"{name}_scale": _make_like(parameter, shorter=block, dtype=torch.float32),
    }


def _make_like(parameter: Tensor, *, shorter: int, dtype: torch.dtype) -> Tensor:
    """Return zeros placed as a parameter is, whose last dim is `shorter` times as short, on each rank too."""
    local = _local(parameter)
    zeros = torch.zeros((*local.shape[:-1], local.shape[-1] // shorter), dtype=dtype, device=local.device)
    if not isinstance(parameter, DTensor):
        return zeros
    shape = torch.Size((*parameter.shape[:-1], parameter.shape[-1] // shorter))
    strides = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(
        zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=strides
    )


def _count_shards(parameter: Tensor, dim: int) -> int:
    """Return over how many ranks a dim is cut."""
    if not isinstance(parameter, DTensor):
        return 1
    mesh = parameter.device_mesh
    # By name: a _StridedShard is a Shard in some versions only.
    return math.prod(
        mesh.size(axis) for axis, its in enumerate(parameter.placements) if getattr(its, "dim", None) == dim
    )


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_gradient(parameter: Tensor) -> Tensor:
    grad = parameter.grad
    assert grad is not None, "only parameters with a gradient come here"
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        grad = grad.redistribute(placements=parameter.placements)
    return _local(grad).contiguous()


def _update_plainly(
    values: Tensor, grad: Tensor, first: Moment, second: Moment, step: Tensor, correction: Tensor, skip: Tensor | None, *,
    salt: int, lr: float, keep: float, l2: float, new1: float, new2: float, eps: float,
) -> None:  # fmt: skip
    """What the kernel does, by torch's own operations, but for skipping."""
    assert skip is None, "the caller skips where there is no kernel"
    param = values.float()
    grad = grad.float() + l2 * param if l2 else grad.float()
    first_bits, second_bits = None, None
    if "bfloat16" in (first.kind, second.kind):
        bits = draw_bits(values.numel(), step=int(step), salt=salt, device=values.device)
        first_bits, second_bits = (
            its.view(values.shape) if moment.kind == "bfloat16" else None
            for its, moment in zip(bits, (first, second), strict=True)
        )
    exp_avg, exp_avg_sq = read(first), read(second)
    exp_avg = exp_avg.lerp(grad.view(exp_avg.shape), new1)
    exp_avg_sq = exp_avg_sq.lerp(grad.square().view(exp_avg_sq.shape), new2)
    denominator = (exp_avg_sq / correction[1]).sqrt_().add_(eps).view(values.shape)
    values.copy_(param * keep - lr * (exp_avg / correction[0]).view(values.shape) / denominator)
    write(first, exp_avg, first_bits)
    write(second, exp_avg_sq, second_bits)


def _launch(
    values: Tensor, grad: Tensor, first: Moment, second: Moment, step: Tensor, correction: Tensor, skip: Tensor | None, *,
    salt: int, **scalars: float,
) -> None:  # fmt: skip
    """Run the kernel on the current stream."""
    import triton

    from trainer.low_precision.adam_kernel import adam_kernel

    block = next((moment.block for moment in (first, second) if moment.scales is not None), _TILE_VALUES)
    tile = _TILE_VALUES // block
    with torch.cuda.device(values.device):
        adam_kernel[(triton.cdiv(values.numel(), _TILE_VALUES),)](
            values, grad, *_point_to(first), *_point_to(second), step, correction, step if skip is None else skip,
            values.numel(), salt=salt, **scalars, FIRST=first.kind, SECOND=second.kind, HAS_SKIP=skip is not None, TILE=tile,
            BLOCK=block,
        )  # fmt: skip


def _point_to(moment: Moment) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return what the kernel takes of a moment: data, scales, values of codes, midpoints. It does not read what a kind has not."""
    data, scales = moment.data, moment.scales
    if scales is None:
        return data, data, data, data
    if moment.kind == "float8":
        data = data.view(torch.float8_e4m3fn)
        return data, scales, scales, scales
    table = get_table(moment.kind, moment.is_signed, data.device)
    return data, scales, table.values, table.midpoints
