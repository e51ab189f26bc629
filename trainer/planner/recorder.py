"""Fake tensors that leave a trace: what memory each operation takes and gives back, and how long it keeps a stream busy.

The tensors are fake ones on the CPU, which stand for those on a GPU: fake CUDA tensors abort a torch without CUDA in their backward
pass. What the program does otherwise on a CPU is replaced in `stand_ins`.
"""

import bisect
import contextlib
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.callback import callback_handler
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.distributed.tensor._sharding_prop import ShardingPropagator

from trainer.config.schedule_actions import Action
from trainer.planner.network import Transfer, describe_collective, list_inner_transfers
from trainer.planner.operations import Work, as_number, describe, list_tensors
from trainer.planner.streams import HOST, PlannedStream, Streams

_DEVICE = torch.device("cpu")
_COMPUTE_FREE = ("empty", "new_empty", "empty_strided", "new_empty_strided", "empty_like", "detach", "alias")
# How much longer kernels take beside a collective of NCCL, whose own kernels need multiprocessors and memory (docs/benchmarks.md: the
# 16B's grouped products, 445 TFLOP/s for 593).
_BESIDE_COLLECTIVES = 4 / 3
# Work that CUDA takes from the host ahead of the device, before a launch waits for room: entries of a channel, as traces show it.
_LAUNCH_QUEUE = 1024
_NO_WORK = {getattr(torch.ops.aten, name) for name in _COMPUTE_FREE} | {torch.ops.prim.device}


@dataclass(slots=True)
class Allocation:
    """One piece of memory, from when it is asked for until nobody holds it."""

    key: int
    size: int
    """Bytes."""
    stream: str
    phase: str
    """What the program was doing."""
    time: float
    is_gathered: bool = False
    """It holds what FSDP gathered."""
    role: str = ""
    """What it turned out to be, once that is known."""


@dataclass(slots=True)
class Change:
    """Memory taken or given back."""

    allocation: Allocation
    is_taken: bool
    phase: str
    time: float


@dataclass
class Span:
    """Something that kept a stream busy."""

    stream: str
    work: Work | Transfer
    phase: str
    begin: float
    seconds: float
    action: Action | None = None
    """In a pipeline: what the rank was about."""
    times: int = 1
    """How often it comes in a step, of which not all was looked at."""


class Recorder(FakeTensorMode):
    """A mode of fake tensors, as torch knows them, with a memory of what happened."""

    def __init__(self, seconds_of: Callable[[Work | Transfer], float]) -> None:
        super().__init__(allow_non_fake_inputs=True)
        self.streams = Streams()
        self.changes: list[Change] = []
        self.spans: list[Span] = []
        self.step = 0
        """Number of the step under way."""
        self._pauses = 0
        self._seconds_of = seconds_of
        self._phase = "setup"
        self._live: dict[int, Allocation] = {}
        self._count = 0
        self._host = PlannedStream(HOST)
        self._networks: dict[str, PlannedStream] = {}
        self.copy_engine_groups: set[str] = set()
        """Names of the process groups whose collectives need no multiprocessor."""
        self._carrying: list[tuple[float, float]] = []
        """From when to when others are under way, as far as compute has not come past them."""
        self._arrivals: dict[int, float] = {}
        self._of_thread = threading.local()
        self._launched: deque[float] = deque(maxlen=_LAUNCH_QUEUE)
        """When the last kernels on the compute stream will be done."""
        self._caught_up = 0.0
        """Until when the host last waited for the device."""

    # --- what is going on ---

    @property
    def phase(self) -> str:
        """What the program is doing: as it was told, or backward where autograd is at work."""
        if self._phase == "forward" and torch._C._current_graph_task_id() != -1:
            return "backward"
        return self._phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self._phase = phase

    @contextlib.contextmanager
    def recording(self) -> Iterator["Recorder"]:
        """Be the mode, give out streams, and leave out what compilers do."""

        def pause(*_: Any) -> None:
            self._pauses += 1

        def go_on(*_: Any) -> None:
            self._pauses -= 1

        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def propagate_unseen(*args: Any, **kwargs: Any) -> Any:
            # DTensor finds shapes out by calling the operation on tensors of the whole size.
            pause()
            try:
                return propagate(*args, **kwargs)
            finally:
                go_on()

        resize = torch.UntypedStorage.resize_
        callback_handler.register_start_callback(pause)
        callback_handler.register_end_callback(go_on)
        try:
            with (
                self.streams.installed(),
                mock.patch.object(torch.UntypedStorage, "resize_", self._wrap_resize(resize)),
                mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate_unseen),
                self,
            ):
                yield self
        finally:
            callback_handler.remove_start_callback(pause)
            callback_handler.remove_end_callback(go_on)

    # --- memory ---

    def _wrap_resize(self, resize: Callable[..., Any]) -> Callable[..., Any]:
        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if not self._pauses:
                self._give_back(id(storage))
                self._take(storage, is_gathered=True)
            return result

        return resized

    def _take(self, storage: torch.UntypedStorage, *, is_gathered: bool = False) -> None:
        # What the host has is known, so that it is not taken for new, but no memory of the device.
        size = 0 if self.streams.current is self._host else as_number(storage.nbytes())
        key = id(storage)
        if key in self._live:
            return
        self._count += 1
        allocation = Allocation(self._count, size, self.streams.current.name, self.phase, self._now(), is_gathered)
        self._live[key] = allocation
        if size:
            self.changes.append(Change(allocation, True, allocation.phase, allocation.time))
        weakref.finalize(storage, self._give_back_if, key, allocation)

    def _give_back_if(self, key: int, allocation: Allocation) -> None:
        if self._live.get(key) is allocation:
            self._give_back(key)

    def _give_back(self, key: int) -> None:
        allocation = self._live.pop(key, None)
        if allocation is not None and allocation.size:
            self.changes.append(Change(allocation, False, self.phase, self._now()))

    def move_to_host(self, tensor: Tensor) -> None:
        """Take a tensor's memory to be the host's from now on."""
        storage = tensor.untyped_storage()
        self._give_back(id(storage))
        with self.streams.use(self._host):
            self._take(storage)

    @contextlib.contextmanager
    def on_host(self) -> Iterator[None]:
        """Do what follows on the CPU, in its memory, after all that the device has to do and before all that it gets to do."""
        for stream in self.streams.all:
            self._host.wait_stream(stream)
        with self.streams.use(self._host):
            yield
        self.streams.compute.wait_stream(self._host)

    def make(self, shape: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a fake tensor in memory of its own: `torch.empty_strided`, past the dispatcher, which takes several times as long."""
        with in_kernel_invocation_manager(self):
            shell = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        tensor = FakeTensor(self, shell, _DEVICE)
        if not self._pauses:
            self._take(tensor.untyped_storage())
        return tensor

    def find(self, tensor: Tensor) -> Allocation | None:
        """Return the memory of a tensor that is alive."""
        return self._live.get(id(tensor.untyped_storage()))

    def _now(self) -> float:
        return self.streams.compute.clock

    # --- time ---

    def spend(self, work: Work) -> None:
        """Keep the current stream busy with a kernel."""
        stream = self.streams.current
        if stream is self._host:
            work = Work("host", bytes=work.bytes, name=work.name)
        seconds = self._seconds_of(work)
        if stream is self.streams.compute:
            seconds = self._slow_down(stream.clock, seconds)
        self._note(Span(stream.name, work, self.phase, stream.clock, seconds))
        stream.clock += seconds
        if stream is self.streams.compute:
            self._launched.append(stream.clock)

    def _note(self, span: Span) -> None:
        span.action = getattr(self._of_thread, "action", None)
        self.spans.append(span)

    @contextlib.contextmanager
    def during(self, action: Action) -> Iterator[None]:
        """Take what this thread does meanwhile to be part of an action of a pipeline."""
        self._of_thread.action = action
        try:
            yield
        finally:
            self._of_thread.action = None

    def wait_until(self, moment: float) -> None:
        """Have the host wait for what the device has done at `moment`: so far it is not ahead of it any more."""
        self._caught_up = max(self._caught_up, moment)

    def is_done_at(self, moment: float) -> bool:
        """Whether a host that asks now, as far ahead of the device as it can be, finds done what is done at `moment`."""
        is_full = len(self._launched) == _LAUNCH_QUEUE
        return moment <= max(self._caught_up, self._launched[0] if is_full else 0.0)

    def find_arrival(self, group: str) -> float:
        """Return when the last collective of a process group is done."""
        return self._networks[group].clock

    def send(self, transfer: Transfer, *, waits: bool) -> float:
        """Start a collective after what the current stream has so far. Return when it is done. waits: whether the stream does."""
        seconds = self._seconds_of(transfer)
        stream = self.streams.current
        network = self._networks.setdefault(transfer.group, PlannedStream(f"network {transfer.group}"))
        begin = max(network.clock, stream.clock)
        network.clock = begin + seconds
        if transfer.group not in self.copy_engine_groups:
            bisect.insort(self._carrying, (begin, network.clock))
        self._note(Span(network.name, transfer, self.phase, begin, seconds))
        if waits:
            stream.clock = network.clock
        return network.clock

    def _slow_down(self, begin: float, seconds: float) -> float:
        """Return how long a kernel takes that would take so many seconds alone: collectives take a part of the device."""
        self._carrying = [interval for interval in self._carrying if interval[1] > begin]
        now, left = begin, seconds
        for start, end in self._carrying:
            alone = min(left, max(0.0, start - now))
            now, left = now + alone, left - alone
            beside = min(left, max(0.0, end - now) / _BESIDE_COLLECTIVES)
            now, left = now + beside * _BESIDE_COLLECTIVES, left - beside
        return now + left - begin

    # --- operations ---

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        # DTensors are not for this mode: their operations come again, with what this rank has of them.
        if result is not NotImplemented and not self._pauses:
            self._observe(func, args, kwargs or {}, result)
        return result

    def _observe(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        outputs = list_tensors(result)
        is_new = False
        for tensor in outputs:
            if tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if id(storage) not in self._live:
                    is_new = True
                    self._take(storage)
        packet = getattr(func, "overloadpacket", func)
        if packet in _NO_WORK:
            return
        if func.namespace in ("c10d", "_c10d_functional"):
            self._communicate(func, args, kwargs, outputs)
        elif is_new or (isinstance(func, torch._ops.OpOverload) and func._schema.is_mutable):
            self.spend(describe(func, (*args, *kwargs.values()), outputs))
            for transfer in list_inner_transfers(func, args):
                self.send(transfer, waits=True)

    def _communicate(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[Tensor]) -> None:
        name = func.overloadpacket.__name__
        if name == "wait_tensor":
            arrival = self._arrivals.pop(id(args[0].untyped_storage()), None)
            if arrival is not None:
                self.streams.current.clock = max(self.streams.current.clock, arrival)
            return
        transfer = describe_collective(func, args, kwargs)
        if transfer is None:
            return
        is_functional = func.namespace == "_c10d_functional"
        if not is_functional:
            for tensor in list_tensors(args):
                allocation = self.find(tensor)
                if allocation is not None:
                    allocation.role = allocation.role or "communication"
        arrival = self.send(transfer, waits=not is_functional and not transfer.is_asynchronous)
        if is_functional:
            for tensor in outputs:
                self._arrivals[id(tensor.untyped_storage())] = arrival
