"""A user's module whose model fails once: on rank 1, in the third step, in the first start."""

import os
from pathlib import Path
from typing import Any

import tests.distributed.user_module  # noqa: F401 registers the model and the data
from trainer.components.passes import Passes

_forward_backward = Passes.forward_backward
_calls = 0


def _fail_once(*args: Any, **kwargs: Any) -> Any:
    global _calls
    _calls += 1
    mark = Path("failed_once")
    if _calls == 5 and os.environ["RANK"] == "1" and not mark.exists():
        mark.touch()
        raise ValueError("the loss of rank 1 is wet")
    return _forward_backward(*args, **kwargs)


Passes.forward_backward = _fail_once  # type: ignore[method-assign]
