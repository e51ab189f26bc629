"""What the fork server imports before it forks ranks: all that a rank would otherwise import for itself, each anew.

The compiler alone takes 1.5 s of a core. torch imports it when it is first used, so that it has to be named here.
"""

import gc

import pytest  # noqa: F401
import torch
import torch._dynamo.backends.debugging
import torch._inductor.compile_fx
import torch._inductor.debug
import torch.distributed.tensor.experimental

import tests.distributed.cases
import tests.distributed.training  # noqa: F401
import trainer.train
import trainer.trainer  # noqa: F401


def _start_compiler() -> None:
    """Have the compiler fill its tables, by a function without gradients: autograd must not run before a fork."""
    with torch.no_grad():
        torch.compile(torch.nn.functional.silu, backend="aot_eager")(torch.zeros(1))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


if torch.version.cuda is None:  # the compiler would ask for devices, and CUDA does not outlive a fork
    _start_compiler()
# Else each rank's first collection of garbage writes to, and so copies, every page that it shares with the others.
gc.collect()
gc.freeze()
