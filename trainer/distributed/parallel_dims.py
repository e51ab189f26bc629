"""Degrees of every parallelism, and the one owner of the device meshes made from them."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from trainer.config.schema_parallel import ParallelismConfig

logger = logging.getLogger(__name__)

_KEYS = {
    "pp": "parallelism.pipeline_parallel_degree",
    "dp_replicate": "parallelism.data_parallel_replicate_degree",
    "dp_shard": "parallelism.data_parallel_shard_degree",
    "cp": "parallelism.context_parallel_degree",
    "tp": "parallelism.tensor_parallel_degree",
    "ep": "parallelism.expert_parallel_degree",
    "etp": "parallelism.expert_tensor_parallel_degree",
}


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of the parallelisms, resolved, and the meshes of the process group.

    Ranks are numbered with pp outermost, then dp_replicate, dp_shard, cp, and tp innermost, where the network is fastest.

    Experts see the same ranks in another way: pp and dp_replicate outermost as ever, then efsdp, ep, and etp innermost. ep and
    etp take no ranks of their own. With etp = tp each expert is cut as other matrices are, and ep borrows from dp_shard x cp.
    With etp = 1 it borrows from tp as well, whose ranks have tokens of their own (sequence parallelism). FSDP shards experts
    over the efsdp ranks that are left.

    Raises:
        ValueError: a degree is below 1, their product is not the number of processes, etp is neither 1 nor tp, or ep does not
            divide the ranks that it may borrow.
    """

    world_size: int
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    _meshes: dict[str, DeviceMesh] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        degrees = self._degrees()
        for name, degree in {**degrees, "ep": self.ep, "etp": self.etp}.items():
            if degree < 1:
                raise ValueError(f"{_KEYS[name]} = {degree} must be 1 or more")
        if prod(degrees.values()) != self.world_size:
            product = " * ".join(f"{_KEYS[name]} ({degree})" for name, degree in degrees.items())
            raise ValueError(
                f"{product} = {prod(degrees.values())}, but there are {self.world_size} processes: "
                f"set {_KEYS['dp_shard']} = -1 to shard over all that the other degrees leave"
            )
        self._check_experts()

    def _check_experts(self) -> None:
        if self.etp not in (1, self.tp):
            raise ValueError(f"{_KEYS['etp']} = {self.etp} must be 1 or {_KEYS['tp']} = {self.tp}")
        lent = self.fsdp * self.tp // self.etp
        if lent % self.ep:
            lenders = [_KEYS[name] for name in ("dp_shard", "cp", *(["tp"] if self.etp == 1 else []))]
            raise ValueError(
                f"{_KEYS['ep']} = {self.ep} must divide the ranks that it borrows, {' x '.join(lenders)} = {lent}"
            )

    @classmethod
    def from_config(cls, parallelism: ParallelismConfig, world_size: int) -> "ParallelDims":
        """Resolve the degrees for `world_size` processes; a shard degree of -1 takes what the others leave.

        Raises:
            ValueError: the degrees do not fit the number of processes.
        """
        dp_shard = parallelism.data_parallel_shard_degree
        others = {
            "dp_replicate": parallelism.data_parallel_replicate_degree,
            "cp": parallelism.context_parallel_degree,
            "tp": parallelism.tensor_parallel_degree,
            "pp": parallelism.pipeline_parallel_degree,
        }
        if dp_shard == -1:
            taken = prod(others.values())
            if taken < 1 or world_size % taken != 0:
                product = " * ".join(f"{_KEYS[name]} ({degree})" for name, degree in others.items())
                raise ValueError(
                    f"{product} = {taken} does not divide the {world_size} processes, "
                    f"so {_KEYS['dp_shard']} = -1 has no whole number to become: change a degree or the number of processes"
                )
            dp_shard = world_size // taken
        experts = {"ep": parallelism.expert_parallel_degree, "etp": parallelism.expert_tensor_parallel_degree}
        return cls(world_size=world_size, dp_shard=dp_shard, **others, **experts)

    def _degrees(self) -> dict[str, int]:
        return {
            "pp": self.pp,
            "dp_replicate": self.dp_replicate,
            "dp_shard": self.dp_shard,
            "cp": self.cp,
            "tp": self.tp,
        }

    @property
    def dp_degree(self) -> int:
        """Number of groups of ranks that see different data."""
        return self.dp_replicate * self.dp_shard

    @property
    def dp_rank(self) -> int:
        """Which of the `dp_degree` parts of each batch this rank reads."""
        return self.dp_rank_of(dist.get_rank() if dist.is_initialized() else 0)

    def dp_rank_of(self, rank: int) -> int:
        """Which part of each batch the process `rank` reads."""
        return rank // (self.tp * self.cp) % self.dp_degree

    @property
    def fsdp(self) -> int:
        """Ranks over which FSDP shards weights: those of context parallelism, which hold the same weights, too."""
        return self.dp_shard * self.cp

    @property
    def efsdp(self) -> int:
        """Ranks over which FSDP shards the experts that are together on one rank of ep."""
        return self.fsdp * self.tp // (self.ep * self.etp)

    @property
    def spreads_experts(self) -> bool:
        """Whether experts see the ranks in another way than other weights do."""
        return self.ep > 1 or self.tp > 1

    def build_mesh(self, device_type: str) -> None:
        """Make the meshes. Collective: all ranks call it. Without a process group (one process) there are none.

        `mesh(name)` then knows, for weights: `pp`, `dp_replicate`, `fsdp` (dp_shard * cp), `tp`, and `hsdp`, the 2-D
        (dp_replicate, fsdp); for data: `dp` (ranks that see different data), `cp`, and `loss` (pp * dp * cp: ranks whose
        losses add up). Axes of degree 1 are left out, `fsdp`, `dp` and `loss` excepted, for each costs a process group a rank.
        """
        assert not self._meshes, "the meshes exist already"
        if not dist.is_initialized():
            assert self.world_size == 1, "several processes need a process group"
            return
        world = init_device_mesh(device_type, (self.world_size,), mesh_dim_names=("world",))
        self._meshes["world"] = world
        # Two views of the same ranks: weights do not care which rank reads what, data does not care who holds which weight.
        weights = self._add_view(world, pp=self.pp, dp_replicate=self.dp_replicate, fsdp=self.fsdp, tp=self.tp)
        if self.dp_replicate > 1:
            self._meshes["hsdp"] = weights["dp_replicate", "fsdp"]
        if self.cp > 1:
            self._add_view(world, pp=self.pp, dp=self.dp_degree, cp=self.cp, tp=self.tp)
        joined: dict[tuple[str, ...], DeviceMesh] = {}
        for name, axes in (("dp", ("dp_replicate", "fsdp")), ("loss", ("pp", "dp_replicate", "fsdp"))):
            kept = tuple(axis for axis in axes if axis in self._meshes)
            if name not in self._meshes:
                if kept not in joined:
                    joined[kept] = weights[kept]._flatten(name) if len(kept) > 1 else weights[kept]
                self._meshes[name] = joined[kept]

    def build_expert_mesh(self) -> None:
        """Make the meshes of a model with experts, after `build_mesh`. Collective: all ranks call it, if any does.

        `mesh(name)` then also knows `efsdp`, `ep` and `etp`, and of these `ehsdp`, the 2-D (dp_replicate, efsdp), and
        `experts`, over which the experts' weights are cut: ep, etp, or the 2-D (ep, etp). Axes of degree 1 are left out,
        `efsdp` excepted.
        """
        degrees = {"efsdp": self.efsdp, "ep": self.ep, "etp": self.etp}
        view = self._add_view(self.mesh("world"), pp=self.pp, dp_replicate=self.dp_replicate, **degrees)
        if self.dp_replicate > 1:
            self._meshes["ehsdp"] = view["dp_replicate", "efsdp"]
        cut = tuple(name for name in ("ep", "etp") if name in self._meshes)
        if cut:
            self._meshes["experts"] = view[cut]

    def _add_view(self, world: DeviceMesh, **degrees: int) -> DeviceMesh:
        """Cut the ranks into these axes, outermost first, and remember each axis that is new."""
        kept = {name: degree for name, degree in degrees.items() if degree > 1 or name in ("fsdp", "dp", "efsdp")}
        view = world._unflatten(0, tuple(kept.values()), tuple(kept))
        for name in kept:
            self._meshes.setdefault(name, view[name])
        return view

    @property
    def has_mesh(self) -> bool:
        """Whether there are meshes. False in one process without a process group."""
        return bool(self._meshes)

    def has_axis(self, name: str) -> bool:
        """Whether there is a mesh of that name with more than one rank."""
        return name in self._meshes and self._meshes[name].size() > 1

    def mesh(self, name: str) -> DeviceMesh:
        """Return the mesh of that name; `build_mesh` lists them.

        Raises:
            KeyError: no such mesh in this run, since its degree is 1 or `build_mesh` was not called.
        """
        if name not in self._meshes:
            raise KeyError(f"no mesh {name!r}: this run has {', '.join(self._meshes) or 'none'}; see {self!r}")
        return self._meshes[name]

    def loss_group(self) -> dist.ProcessGroup | None:
        """Group of the ranks over which losses and token counts are summed; None without a process group."""
        return self.mesh("loss").get_group() if self.has_mesh else None

    def stage_group(self) -> dist.ProcessGroup | None:
        """Group of the ranks that hold parts or copies of the same layers: all of this pipeline stage; None without a process group.

        Under pipeline parallelism it is made on the first call, which is then collective over all ranks.
        """
        if not self.has_mesh:
            return None
        if self.pp == 1:
            return dist.group.WORLD
        if "stage" not in self._meshes:
            view = self.mesh("world")._unflatten(0, (self.pp, self.world_size // self.pp), ("pp", "stage"))
            self._meshes["stage"] = view["stage"]
        return self._meshes["stage"].get_group()

    def groups(self) -> Iterator[dist.ProcessGroup]:
        """Yield each process group of this rank once, the world's first."""
        if not dist.is_initialized():
            return
        seen = set()
        candidates = [dist.group.WORLD, *(group for mesh in self._meshes.values() for group in mesh.get_all_groups())]
        for group in candidates:
            assert group is not None, "the default process group exists"
            if group.group_name not in seen:
                seen.add(group.group_name)
                yield group
