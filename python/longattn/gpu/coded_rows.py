"""Keys and values as 8-bit codes on a GPU: a scale and an offset per row, as `longattn.KVStore` keeps them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from longattn.gpu._checks import heads_view, is_aligned
from longattn.gpu._device import KERNEL_DTYPES, Device, View, device_of

_THREADS = 256
_ALIGNMENT = 16
_PARAMETERS_ALIGNMENT = 8  # scale and offset are read together


@dataclass(frozen=True, slots=True)
class CodedRows:
    """Keys or values whose rows are `offset + scale * code`.

    A number is off by at most half a scale, which is its row's range over 255.

    Attributes:
        codes: uint8 `[B, Hkv, L, D]` on the device; D is 64, 128 or 256.
        parameters: float32 `[B, Hkv, L, 2]`: scale and offset of each row.
    """

    codes: Any
    parameters: Any

    def from_row(self, first: int) -> CodedRows:
        """The rows from `first` on, without a copy."""
        return CodedRows(self.codes[:, :, first:], self.parameters[:, :, first:])


def encode_rows(x: Any, *, device: Device | None = None) -> CodedRows:
    """Codes of rows, by the rule of a `longattn.KVStore` of dtype "int8".

    Args:
        x: keys or values `[B, H, L, D]` on a GPU; float32, float16 or bfloat16.
        device: the back end; `None` is that of `x`.

    Returns:
        The codes. A row with a NaN or an infinity becomes NaN.

    Raises:
        TypeError: arrays of no GPU, or another dtype.
        ValueError: another rank or head size.

    Cost: two passes over `x`.
    """
    device = device or device_of(x, "x")
    view = heads_view(device, x, "x")
    batch, heads, rows, dim = view.shape
    codes = device.empty(view.shape, "uint8", x)
    parameters = device.empty((batch, heads, rows, 2), "float32", x)
    if math.prod(view.shape):
        arguments = (
            view.pointer,
            device.view(codes, "codes").pointer,
            device.view(parameters, "parameters").pointer,
            *(np.int64(stride) for stride in view.strides[:3]),
            np.int32(rows),
            np.int32(dim),
        )
        launch = device.kernel("codes", f"codes_encode_{KERNEL_DTYPES[view.dtype]}")
        launch((-(-rows // (_THREADS // 32)), heads, batch), (_THREADS,), arguments, 0)
    return CodedRows(codes, parameters)


def coded_views(device: Device, rows: CodedRows, name: str) -> tuple[View, View]:
    """Memory of codes and parameters that a kernel can read.

    Raises:
        TypeError: other dtypes.
        ValueError: shapes that do not fit each other, or rows that are not aligned.
    """
    codes, parameters = device.view(rows.codes, f"{name}.codes"), device.view(rows.parameters, f"{name}.parameters")
    if codes.dtype != "uint8" or parameters.dtype != "float32":
        raise TypeError(
            f"{name}: got codes {codes.dtype} and parameters {parameters.dtype}, expected uint8 and float32"
        )
    if len(codes.shape) != 4 or parameters.shape != (*codes.shape[:3], 2):
        raise ValueError(
            f"{name}: got codes {codes.shape} and parameters {parameters.shape}, expected [.., D] and [.., 2]"
        )
    aligned = is_aligned(codes, _ALIGNMENT) and is_aligned(parameters, _PARAMETERS_ALIGNMENT)
    if codes.strides[3] != 1 or not aligned or parameters.strides[2:] != (2, 1):
        raise ValueError(
            f"{name}: got codes or parameters that do not lie row by row, aligned to {_ALIGNMENT} bytes "
            f"and to {_PARAMETERS_ALIGNMENT}"
        )
    return codes, parameters
