"""torch.compile, block by block: one graph for a block's code, shared by all blocks, and small enough to compile in seconds."""

import logging
import time
from typing import Any

import torch
import torch._inductor.config
import torch.nn as nn
from torch._dynamo.callback import callback_handler

from models.plan import ParallelPlan, match_modules
from trainer.config.schema_parallel import CompileConfig

logger = logging.getLogger(__name__)


def compiles_model(section: CompileConfig) -> bool:
    """Whether the blocks of the model are to be compiled."""
    return section.enable and "model" in section.components


def apply_compile(model: nn.Module, *, plan: ParallelPlan, section: CompileConfig) -> None:
    """Compile the forward of each of the plan's blocks, where the section asks for it, in place and without a graph break.

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
    modules = dict(model.named_modules())
    for name in match_modules(plan.blocks, modules):
        block = modules[name]
        # The forward rather than the module: hooks (FSDP's) run before and after it, and no wrapper changes the names.
        # Static shapes: a change of length, as in validation, gets a graph of its own rather than a slower one for all.
        block.forward = torch.compile(block.forward, backend=section.backend, fullgraph=True, dynamic=False)
    _log_compile_times()


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
