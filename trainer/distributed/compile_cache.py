"""Keep torch's cache of compiled graphs from taking one DTensor for another.

torch 2.13 keys a graph by what each DTensor says of itself: mesh, placements, global shape and dtype. What lies inside, it leaves
out: a graph that was made for plain local tensors is then run on quantized ones, with a crash of the process, or one that was made
for another GPU of the same host (pytorch issue 188390). torch 2.11 has no such key.
"""

import hashlib

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_METHOD = "_stable_hash_for_caching"


def guard_compile_cache() -> None:
    """Have keys say all of a DTensor, in this process. Before the first compilation. Does nothing the second time, or to torch 2.11."""
    theirs = getattr(DTensor, _METHOD, None)
    if theirs is None or hasattr(theirs, "keys_alone"):
        return

    def get_key(self: DTensor) -> str:
        whole = f"{theirs(self)} {describe(self._local_tensor)}"
        return hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()

    get_key.keys_alone = theirs  # type: ignore[attr-defined]
    setattr(DTensor, _METHOD, get_key)


def describe(tensor: Tensor) -> str:
    """Return class, dtype, device, shape and strides of a tensor, and of all tensors that it is made of."""
    said = f"{tensor.dtype} {tensor.device} {tuple(tensor.shape)} {tensor.stride()} {tensor.requires_grad}"
    if not hasattr(tensor, "__tensor_flatten__"):
        return said
    names, context = tensor.__tensor_flatten__()
    cls: type[torch.Tensor] = type(tensor)
    inner = ", ".join(f"{name}={describe(getattr(tensor, name))}" for name in names)
    return f"{cls.__module__}.{cls.__qualname__}({said}; {context!r}; {inner})"
