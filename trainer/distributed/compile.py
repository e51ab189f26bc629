"""torch.compile, block by block: one graph for a block's code, shared by all blocks, and small enough to compile in seconds."""

import functools
import logging
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch._inductor.config
import torch.nn as nn
from torch._dynamo.callback import callback_handler

from models.common.token_dispatch import Rows
from models.plan import ParallelPlan
from trainer.config.schema_parallel import CompileConfig
from trainer.distributed.activation_checkpoint import replace_methods
from trainer.distributed.stop_signals import SIGNALS

logger = logging.getLogger(__name__)

_MAX_GRAPHS = 64


def compiles_model(section: CompileConfig) -> bool:
    """Whether the blocks of the model are to be compiled."""
    return section.enable and "model" in section.components


def apply_compile(
    model: nn.Module,
    *,
    plan: ParallelPlan,
    section: CompileConfig,
    spreads_experts: bool = False,
    backend: str | Callable[..., Any] | None = None,
) -> None:
    """Compile the forward of each of the plan's blocks, or of `model`, as the section says, in place and without a graph break.

    spreads_experts: whether experts are on several ranks. Their blocks are compiled piece by piece: the rows that an exchange
    brings, and the weights that FSDP gathers for them alone, enter from outside. One graph is for any number of rows. backend: in place
    of the section's.

    After activation checkpointing, which becomes part of the graph; before FSDP, whose hooks stay outside of it. Names of
    modules and parameters stay as they are. Compilation happens in the first forward of each shape, and is timed in the log.

    An asynchronous collective's result that enters a block here loses `requires_grad` in torch 2.12 and 2.13 (pytorch PR
    179849): whoever hands one to a block must wait for it first.
    """
    if not compiles_model(section):
        return
    # Inductor's own launcher holds the interpreter's lock while the device's queue is full: when another rank stalls, no thread of
    # this process runs, neither the watchdog nor a dump of the flight recorder. Triton's lets go of it (both seen on 2.11).
    torch._inductor.config.use_static_cuda_launcher = False
    # Blocks share one code, and each kind of them (with experts or without, in float8 or not) has a graph for training, for
    # evaluation, for each way to scale, measured or not: more than the 8 after which torch refuses to compile whole graphs.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_GRAPHS)
    # Methods rather than modules: hooks (FSDP's) run before and after `forward`, and no wrapper changes the names.
    # Static shapes: a change of length, as in validation, gets a graph of its own rather than a slower one for all.
    own_backend, _ = section.get_backend()
    compiled = functools.partial(torch.compile, backend=backend or own_backend, fullgraph=True, dynamic=False)
    if section.scope == "model":
        replace_methods(model, ("forward",), compiled)
        _log_compile_times()
        return
    modules = dict(model.named_modules())
    for name, pieces in plan.list_pieces(modules, spreads_experts=spreads_experts).items():
        replace_methods(modules[name], pieces, lambda method: _mark_rows(compiled(method)))
    if own_backend == "inductor":
        _start_workers()
    _log_compile_times()


def _start_workers() -> None:
    """Start inductor's own processes, which it would do in the first compilation, deaf to the signals that ask a run to stop.

    SLURM sends these to all processes of a job. Without them the compilation that is under way would fail, and the run with it. They
    end with this process.
    """
    from torch._inductor.async_compile import maybe_warm_pool  # a second of imports, for compilation alone

    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # a program inherits what is blocked
    try:
        maybe_warm_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _mark_rows(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return a compiled function that is not compiled again for each number of rows that come to the experts."""

    @functools.wraps(compiled)
    def marked(*args: Any, **kwargs: Any) -> Any:
        for argument in args:
            if isinstance(argument, Rows):
                torch._dynamo.maybe_mark_dynamic(argument.tokens, 0)
                torch._dynamo.maybe_mark_dynamic(argument.gates, 0)
        return compiled(*args, **kwargs)

    return marked


class _CompileTimer:
    """Logs how long each compilation took, summed since the process began."""

    def __init__(self) -> None:
        self.begin = 0.0
        self.total = 0.0
        self.count = 0

    def start(self, *_: Any) -> None:
        self.begin = time.monotonic()

    def end(self, *_: Any) -> None:
        seconds = time.monotonic() - self.begin
        self.total += seconds
        self.count += 1
        logger.info("compiled graph %d in %.1f s (%.1f s so far)", self.count, seconds, self.total)


_timer = _CompileTimer()


def _log_compile_times() -> None:
    if _timer.start not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_timer.start)
        callback_handler.register_end_callback(_timer.end)
