"""A float8 matrix that passes for one in high precision: what travels between ranks in float8 and is used as it came."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from trainer.low_precision.scaling import Quantized

_aten = torch.ops.aten

_SHAPE_ONLY = {
    _aten.view.default,
    _aten._unsafe_view.default,
    _aten.slice.Tensor,
    _aten.detach.default,
    _aten.alias.default,
    _aten.clone.default,
    _aten.as_strided.default,
}
"""Operations that leave values as they are, so that the result is float8 too."""


class Float8Tensor(torch.Tensor):
    """Float8 values with one scale. To autograd it has the dtype that it was made from, and so have its gradients.

    Operations that know nothing of it get its values in that dtype.
    """

    _data: Tensor
    _scale: Tensor

    @staticmethod
    def __new__(cls, data: Tensor, scale: Tensor, dtype: torch.dtype) -> "Float8Tensor":
        """data: float8; scale: 0-dim float32; dtype: what it passes for."""
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            data.size(),
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=dtype,
            device=data.device,
        )
        self._data, self._scale = data, scale
        return self

    @property
    def quantized(self) -> Quantized:
        """Its values and their scale."""
        return Quantized(self._data, self._scale)

    def dequantize(self) -> Tensor:
        """Return its values in high precision."""
        return self.quantized.dequantize().to(self.dtype)

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["_data", "_scale"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> "Float8Tensor":
        return Float8Tensor(inner["_data"], inner["_scale"], dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Float8Tensor({self._data}, scale={self._scale}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as a function
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _SHAPE_ONLY:
            this = args[0]
            return Float8Tensor(func(this._data, *args[1:], **kwargs), this._scale, this.dtype)
        args, kwargs = tree_map_only(Float8Tensor, Float8Tensor.dequantize, (args, kwargs))
        return func(*args, **kwargs)

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def as_high_precision(x: Tensor) -> Tensor:
    """Return a tensor that may be a `Float8Tensor` as a plain one."""
    return x.dequantize() if isinstance(x, Float8Tensor) else x
