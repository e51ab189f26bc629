"""Tensor parallelism: each matrix is cut over the ranks of one mesh axis (Shoeybi et al., arXiv 1909.08053), and
between the matrices the residual stream is cut along the sequence (Korthikanti et al., arXiv 2205.05198).

Parameters become DTensors on the tp axis, which FSDP, clipping, optimizers and checkpoints understand. Activations stay
plain tensors: a style makes its module a class of its own, whose forward says which collective runs before or after it.

Why not torch's ParallelStyles: they hand AsyncCollectiveTensors to compiled blocks, which costs those their gradient
(see `tensor_collectives`); they put DTensors between modules, which each operation pays for; and none of them
replicates keys and values. Why a class, and no closure of each instance as its `forward`: torch.compile guards on the
identity of the latter, and would compile each block anew. A function that all instances share would do as well.

Letters: B batch, S tokens of all ranks, s = S / degree tokens of one, D model width, V vocabulary, v rows of one rank.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from models.common.output import LossFunction
from models.common.router import Router
from models.plan import ParallelPlan, match_modules
from trainer.config.errors import UserError
from trainer.distributed.sequence_collectives import sum_counts
from trainer.distributed.tensor_collectives import (
    TensorAxis,
    gather_columns,
    gather_sequence,
    scatter_sequence,
    sum_gradient,
)


def apply_tensor_parallel(
    model: nn.Module,
    *,
    plan: ParallelPlan,
    mesh: DeviceMesh,
    compiles_blocks: bool,
    async_tp: bool,
    localizes: bool = True,
    styles: "Mapping[str, Style] | None" = None,
) -> None:
    """Cut the parameters of `model`, on the meta device, over `mesh`, and give its modules the plan's styles, in place.

    Before anything else is applied to the model, but for expert parallelism, which places the experts. All ranks of the mesh get the same tokens, positions, masks and
    labels, whose number S is a multiple of the degree; from block to block go activations (B, s, D).

    compiles_blocks: whether the plan's blocks will be compiled. async_tp: overlap communication with matrix products,
    which needs CUDA and compiled blocks. localizes: whether to make each module's `local_weight`; SimpleFSDP does that itself.
    styles: the meaning of each name in the plan, by default `STYLES`.

    Raises:
        ValueError: an unknown style, a glob that matches nothing, a parameter without a style, sizes that cannot be
            cut, or (`UserError`) `async_tp` where it cannot be had.
    """
    styles = STYLES if styles is None else styles
    unknown = sorted(set(plan.tp.values()) - styles.keys())
    if unknown:
        raise ValueError(f"ParallelPlan.tp has unknown styles: {', '.join(unknown)}. Known are: {', '.join(styles)}")
    if async_tp:
        _enable_async_tensor_parallel(mesh, compiles_blocks)
    modules = dict(model.named_modules())
    blocks = match_modules(plan.blocks, modules) if compiles_blocks else []
    axis = TensorAxis.from_group(mesh.get_group(), fusible=async_tp)
    placed: dict[nn.Parameter, nn.Parameter] = {}
    for glob, style in plan.tp.items():
        for name in match_modules(glob, modules):
            block = next((block for block in blocks if name.startswith(f"{block}.")), name)
            parent = modules[name.rpartition(".")[0]]
            styles[style](Site(name, modules[name], parent, modules[block], mesh, axis, placed, localizes))
    mixtures = match_modules(plan.experts, modules) if plan.experts else []
    experts = {parameter for name in mixtures for parameter in modules[f"{name}.experts"].parameters()}
    forgotten = [name for name, p in model.named_parameters() if not isinstance(p, DTensor) and p not in experts]
    if forgotten:
        raise ValueError(f"ParallelPlan.tp gives no style to the modules of these parameters: {', '.join(forgotten)}")


def _enable_async_tensor_parallel(mesh: DeviceMesh, compiles_blocks: bool) -> None:
    """Have the compiler fuse collectives with the matrix products next to them: both run in pieces, in turns.

    The fused kernels exchange pieces through memory that all GPUs of the group can reach (NVLink).
    """
    if mesh.device_type != "cuda" or not compiles_blocks:
        raise UserError(
            "parallelism.enable_async_tensor_parallel = true is the compiler's work, on CUDA only: it needs "
            f"compile.enable with 'model' in compile.components, and not the device type {mesh.device_type!r}"
        )
    import torch._inductor.config as inductor_config
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor_config._micro_pipeline_tp = True
    enable_symm_mem_for_group(mesh.get_group().group_name)


@dataclass(frozen=True)
class Site:
    """A module that is given a style, and what the style may need to know."""

    name: str
    module: nn.Module
    parent: nn.Module
    """The module that holds it."""
    entry: nn.Module
    """The module whose call leads to this one's through compiled code: its block. Else the module itself."""
    mesh: DeviceMesh
    axis: TensorAxis
    """The ranks of the mesh, for the forward."""
    placed: dict[nn.Parameter, nn.Parameter]
    """What became of each parameter so far: modules that share one go on sharing it."""
    localizes: bool
    """Whether `localize_weight` makes local weights, rather than only places them."""

    def place_weight(self, placement: Placement) -> None:
        """Make the module's weight a DTensor.

        Raises:
            ValueError: the dim to be cut does not divide, or a shared weight was placed in another way.
        """
        whole = self.module.weight
        assert isinstance(whole, nn.Parameter), f"{self.name}.weight is no parameter"
        if whole not in self.placed:
            self._check_divides(whole, placement)
            local = distribute_tensor(whole.detach(), self.mesh, [placement], src_data_rank=None)
            self.placed[whole] = nn.Parameter(local, whole.requires_grad)
        weight = self.placed[whole]
        assert isinstance(weight, DTensor)
        if weight.placements != (placement,):
            raise ValueError(
                f"{self.name}.weight is shared, and placed as {weight.placements[0]}: it cannot be {placement} too"
            )
        self.module.weight = weight

    def _check_divides(self, weight: Tensor, placement: Placement) -> None:
        # FSDP cuts each rank's part again, and its pieces of unequal parts are not those that DTensor takes them for
        # (torch 2.11 to 2.13): of 50257 rows over 2 x 4 ranks two pieces are off by one. Checkpoints would lose a row.
        if isinstance(placement, Shard) and weight.shape[placement.dim] % self.mesh.size():
            raise ValueError(
                f"parallelism.tensor_parallel_degree = {self.mesh.size()} must divide {weight.shape[placement.dim]}, "
                f"dim {placement.dim} of {self.name}.weight: choose another degree, or another width in the flavor"
            )

    def become(self, cls: type[nn.Module], **attributes: Any) -> None:
        """Make the module one of class `cls`, with these attributes and its `axis`.

        A module of a subclass of that class's base keeps what else it can do.

        Raises:
            ValueError: the module is none that this style is for.
        """
        base = cls.__bases__[0]
        if not isinstance(self.module, base):
            raise ValueError(f"{self.name} is a {type(self.module).__name__}, but its style is for {base.__name__}")
        self.module.__class__ = cls if type(self.module) is base else _combine(cls, type(self.module))
        for name, value in {"axis": self.axis, **attributes}.items():
            setattr(self.module, name, value)

    def localize_weight(self, placement: Placement) -> None:
        """Place the weight, and make `module.local_weight`, this rank's part as a plain tensor, anew in each forward pass.

        That is before compiled code begins, which would else take in DTensors: they are slow to trace, and with
        recomputation do not compile in torch 2.13. FSDP's hook, which gathers the weight, goes before this one.

        Raises:
            ValueError: see `place_weight`.
        """
        self.place_weight(placement)
        if self.localizes:
            self.entry.register_forward_pre_hook(functools.partial(_localize_weight, self.module, (placement,)))


Style = Callable[[Site], None]
"""Places a module's weight, and changes its forward."""


_combined: dict[tuple[type[nn.Module], type[nn.Module]], type[nn.Module]] = {}


def _combine(cls: type[nn.Module], module_cls: type[nn.Module]) -> type[nn.Module]:
    """Return the class that is both: always the same one, for compiled blocks to share a graph."""
    key = (cls, module_cls)
    if key not in _combined:
        _combined[key] = type(f"{cls.__name__}Of{module_cls.__name__}", key, {})
    return _combined[key]


def _localize_weight(module: nn.Module, placements: tuple[Placement, ...], *_: Any) -> None:
    weight = module.weight
    assert isinstance(weight, DTensor)
    assert weight.placements == placements, f"{weight.placements} is not gathered: its FSDP unit lies inside of a block"
    # Not by setattr: torch 2.13 takes this for a parameter, and would register it.
    object.__setattr__(module, "local_weight", weight.to_local())


# Matrices.


def multiply(module: nn.Linear, x: Tensor, weight: Tensor) -> Tensor:
    """Return x times a part of the module's weight, as the module does it. x: (..., in); weight: (out, in)"""
    own = getattr(module, "multiply", None)  # one in low precision has its own
    return F.linear(x, weight) if own is None else own(x, weight)


class ColwiseLinear(nn.Linear):
    """Makes a part of the output's features. x: (B, S, in), whole -> (B, S, out / degree)"""

    local_weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self, x, self.local_weight)


class RowwiseLinear(nn.Linear):
    """Takes a part of the input's features, and makes those tokens' output that are this rank's.

    x: (B, S, in / degree) -> (B, s, out)
    """

    axis: TensorAxis
    local_weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return scatter_sequence(multiply(self, x, self.local_weight), self.axis)


class GatheringColwiseLinear(nn.Linear):
    """Gathers the sequence, and makes a part of the output's features. x: (B, s, in) -> (B, S, out / degree)"""

    axis: TensorAxis
    local_weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self, gather_sequence(x, self.axis), self.local_weight)


class SequenceLinear(nn.Linear):
    """Works on this rank's tokens, with a weight that all ranks have. x: (B, s, in) -> (B, s, out)"""

    axis: TensorAxis
    local_weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return multiply(self, x, sum_gradient(self.local_weight, self.axis))


class GatheredSequenceLinear(nn.Linear):
    """The same, and gathers the results: for those narrower than their input. x: (B, s, in) -> (B, S, out)"""

    axis: TensorAxis
    local_weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return gather_sequence(multiply(self, x, sum_gradient(self.local_weight, self.axis)), self.axis)


class SharedHeadLinear(nn.Linear):
    """Makes the one key or value head that this rank's query heads share, from a weight that all ranks have.

    x: (B, S, in), whole -> (B, S, head_dim)
    """

    axis: TensorAxis
    local_weight: Tensor
    rows: tuple[int, int]

    def forward(self, x: Tensor) -> Tensor:
        begin, end = self.rows
        return multiply(self, x, sum_gradient(self.local_weight, self.axis)[begin:end])


def apply_colwise(site: Site) -> None:
    site.become(ColwiseLinear)
    site.localize_weight(Shard(0))


def apply_rowwise(site: Site, cls: type[nn.Linear] = RowwiseLinear) -> None:
    site.become(cls)
    site.localize_weight(Shard(1))


def apply_gather_seq_colwise(site: Site) -> None:
    site.become(GatheringColwiseLinear)
    site.localize_weight(Shard(0))


def apply_sequence_linear(site: Site) -> None:
    site.become(SequenceLinear)
    site.localize_weight(Replicate())


def apply_sequence_linear_gather(site: Site) -> None:
    site.become(GatheredSequenceLinear)
    site.localize_weight(Replicate())


def apply_colwise_kv(site: Site) -> None:
    """Cut keys or values by heads, or replicate them if there are fewer heads than ranks.

    The parent knows `n_heads`, `n_kv_heads` and `head_dim`.

    Raises:
        ValueError: heads that cannot be dealt out evenly.
    """
    attention: Any = site.parent
    degree, rank = site.axis.degree, site.axis.rank
    if attention.n_heads % degree:
        raise ValueError(
            f"parallelism.tensor_parallel_degree = {degree} must divide n_heads = {attention.n_heads} of {site.name}"
        )
    if attention.n_kv_heads % degree == 0:
        apply_colwise(site)
        return
    if degree % attention.n_kv_heads:
        raise ValueError(
            f"parallelism.tensor_parallel_degree = {degree} must divide n_kv_heads = {attention.n_kv_heads} of "
            f"{site.name}, or be a multiple of it"
        )
    head = rank * attention.n_kv_heads // degree
    site.become(SharedHeadLinear, rows=(head * attention.head_dim, (head + 1) * attention.head_dim))
    site.localize_weight(Replicate())


# Sequences.


class SequenceRMSNorm(nn.RMSNorm):
    """Normalizes this rank's tokens. x: (B, s, D) -> (B, s, D)"""

    axis: TensorAxis
    local_weight: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, sum_gradient(self.local_weight, self.axis), self.eps)


class GatherSequence(nn.Module):
    """Gathers the first argument. x: (B, s, D), which the module gets as (B, S, D)"""

    axis: TensorAxis

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(gather_sequence(x, self.axis), *args, **kwargs)


def apply_sequence(site: Site) -> None:
    site.become(SequenceRMSNorm)
    site.localize_weight(Replicate())


def apply_gather_seq(site: Site) -> None:
    site.become(GatherSequence)


# Experts.


class SequenceRouter(Router):
    """Routes this rank's tokens. x: (B, s, D)"""

    axis: TensorAxis

    def get_gate_weight(self) -> Tensor:
        weight = self.gate.local_weight
        assert isinstance(weight, Tensor), "made anew in each forward pass"
        return sum_gradient(weight.float(), self.axis)


def apply_router(site: Site) -> None:
    """Have each rank route its own tokens. Their experts are the business of `expert_parallel`."""
    site.become(SequenceRouter, sum_over_sequence=_get_sum_of_counts(site.axis))
    router = site.module
    assert isinstance(router, SequenceRouter)
    gate = replace(site, name=f"{site.name}.gate", module=router.gate, parent=router, entry=site.entry)
    gate.localize_weight(Replicate())


@functools.cache
def _get_sum_of_counts(axis: TensorAxis) -> Callable[[Tensor], Tensor]:
    """Return one and the same function for all routers, for compiled blocks to share a graph."""
    return functools.partial(sum_counts, group_name=axis.group_name)


# Vocabulary.


class VocabularyEmbedding(nn.Embedding):
    """Looks up the tokens whose rows this rank has; the others are zeros of a sum. tokens: (B, S) -> (B, s, D)"""

    axis: TensorAxis
    reads_placed_weight = True

    def forward(self, tokens: Tensor) -> Tensor:
        weight = _cut_by_rows(self.weight)
        begin, end = self.axis.part(weight.shape[0])
        rows, index = weight.to_local(), tokens - begin
        if begin == end:
            # Part of the graph all the same: all ranks must have a gradient.
            return scatter_sequence(rows.new_zeros(*tokens.shape, rows.shape[1]) + rows.sum(), self.axis)
        is_mine = (index >= 0) & (index < end - begin)
        # Tokens of other ranks read any row, and add zero to its gradient: not all of them the same one.
        h = F.embedding(index.remainder(end - begin), rows)
        return scatter_sequence(h.masked_fill(~is_mine.unsqueeze(-1), 0.0), self.axis)


class VocabularyOutput(nn.Module):
    """Makes the loss of the whole vocabulary, or all logits.

    h: (B, s, D); labels: (B, S) -> what `loss_fn` returns, given hidden states (B, S, D), labels and a weight that is a
    DTensor of (V, D), cut by rows; without it logits (B, S, V), on all ranks.
    """

    axis: TensorAxis
    reads_placed_weight = True
    weight: Tensor

    def forward(self, h: Tensor, *, labels: Tensor | None = None, loss_fn: LossFunction | None = None) -> Tensor:
        if (labels is None) != (loss_fn is None):
            raise ValueError("labels and loss_fn go together: give both for the loss, neither for logits")
        weight = _cut_by_rows(self.weight)
        h = gather_sequence(h, self.axis)
        if labels is None or loss_fn is None:
            return gather_columns(F.linear(h, weight.to_local()), weight.shape[0], self.axis)
        return loss_fn(h, weight, labels)


def apply_embedding(site: Site) -> None:
    site.become(VocabularyEmbedding)
    _place_vocabulary(site)


def apply_output(site: Site) -> None:
    site.become(VocabularyOutput)
    _place_vocabulary(site)


def _place_vocabulary(site: Site) -> None:
    """Cut (V, D) by rows. Where the degree does not divide V, keep columns, and exchange them for rows in each pass.

    Rows of unequal parts cannot be kept: see `Site.place_weight`.
    """
    weight = site.module.weight
    assert isinstance(weight, Tensor)
    site.place_weight(Shard(1) if weight.shape[0] % site.axis.degree else Shard(0))


def _cut_by_rows(weight: Tensor) -> DTensor:
    assert isinstance(weight, DTensor)
    return weight.redistribute(placements=[Shard(0)])


STYLES: Mapping[str, Style] = {
    "embedding": apply_embedding,
    "sequence": apply_sequence,
    "gather_seq": apply_gather_seq,
    "colwise": apply_colwise,
    "colwise_kv": apply_colwise_kv,
    "gather_seq_colwise": apply_gather_seq_colwise,
    "rowwise": apply_rowwise,
    "sequence_linear": apply_sequence_linear,
    "sequence_linear_gather": apply_sequence_linear_gather,
    "router": apply_router,
    "output": apply_output,
}
