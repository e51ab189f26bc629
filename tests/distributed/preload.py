"""What the fork server imports before it forks ranks: all that a rank would otherwise import for itself, each anew.

The compiler alone takes 1.5 s of a core. torch imports it when it is first used, so that it has to be named here. On a build with CUDA
it would look for devices when it is imported, and CUDA does not outlive a fork: there ranks import it for themselves.
"""

import gc
import importlib

import torch

_ANYWHERE = (
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "torch.nn.attention.flex_attention",
    "torch._dynamo",
)
_WITHOUT_CUDA = (
    "pytest",
    "torch._dynamo.backends.debugging",
    "torch._inductor.compile_fx",
    "torch._inductor.debug",
    "torch.distributed.tensor.experimental",
    "tests.distributed.cases",
    "tests.distributed.training",
    "trainer.train",
    "trainer.trainer",
)


def _start_compiler() -> None:
    """Have the compiler fill its tables, by a function without gradients: autograd must not run before a fork."""
    with torch.no_grad():
        torch.compile(torch.nn.functional.silu, backend="aot_eager")(torch.zeros(1))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


for name in _ANYWHERE:
    importlib.import_module(name)
if torch.version.cuda is None:
    for name in _WITHOUT_CUDA:
        importlib.import_module(name)
    _start_compiler()
# Else each rank's first collection of garbage writes to, and so copies, every page that it shares with the others.
gc.collect()
gc.freeze()
