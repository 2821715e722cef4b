from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyllm import _C
from pyllm.ops.gradients import once_differentiable

GROUP = 32  # elements along K that share a scale


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (N, K) of small whole numbers in groups of 32 along K, which is filled up to whole groups.

    values: uint8, (N, 32 G) for 8 bits, or (N, 16 G) for 4, the first of two neighbours in a byte's low half.
    scales: (N, G), float16 or float32.
    minimums: as scales, or None. An element is value * scale + minimum, or without (value - 2^(bits - 1)) * scale.
    """

    values: Tensor
    scales: Tensor
    minimums: Tensor | None
    bits: int
    shape: tuple[int, int]  # (N, K)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.scales, self.minimums) if t is not None)

    def unpack(self) -> QuantizedWeight:
        """Itself: what `pyllm.reference.pack_quantized` leaves can be asked for the same."""
        return self

    def dequantize(self) -> Tensor:
        """The weight in float32, (N, K)."""
        values = self.values
        if self.bits == 4:
            values = torch.stack((values & 15, values >> 4), -1).flatten(1)
        grouped = values.unflatten(1, (-1, GROUP)).float()
        scales = self.scales.float()[..., None]
        if self.minimums is None:
            grouped = (grouped - 2 ** (self.bits - 1)) * scales
        else:
            grouped = grouped * scales + self.minimums.float()[..., None]
        return grouped.flatten(1)[:, : self.shape[1]]


@dataclass(frozen=True)
class PackedQuantizedWeight:
    """A `QuantizedWeight` in the order that the product reads it, made by `pack_quantized` for the instruction set in
    use then."""

    panels: Tensor  # uint8, (N / P rounded up, G, bytes of P rows' group)
    bits: int
    half_scales: bool
    has_minimums: bool
    shape: tuple[int, int]

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    @property
    def format(self) -> str:
        """As `pyllm.quantize` names it: "int8", "int4" or "int4-min"."""
        return f"int{self.bits}" + ("-min" if self.has_minimums else "")

    def unpack(self) -> QuantizedWeight:
        count, groups, size = self.panels.shape
        dtype = torch.float16 if self.half_scales else torch.float32
        parts = 1 + self.has_minimums
        width = size // (GROUP * self.bits // 8 + dtype.itemsize * parts)
        n, rows, quads = self.shape[0], count * width, self.bits
        values, *rest = self.panels.split([width * quads * 4] + [width * dtype.itemsize] * parts, -1)
        values = values.unflatten(-1, (quads, width, 4)).permute(0, 3, 1, 2, 4).reshape(rows, groups, quads * 4)
        if self.bits == 4:  # a group's first half is in the low bits
            halves = torch.cat((values & 15, values >> 4), -1).unflatten(-1, (16, 2))
            values = halves[..., 0] | halves[..., 1] << 4
        scales = [t.contiguous().view(dtype).transpose(1, 2).reshape(rows, groups)[:n].contiguous() for t in rest]
        return QuantizedWeight(values.flatten(1)[:n].contiguous(), scales[0], scales[1] if self.has_minimums else None,
                               self.bits, self.shape)  # fmt: skip


def pack_quantized(weight: QuantizedWeight) -> PackedQuantizedWeight:
    """Packs a quantised weight for `quantized_linear`.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit the others.
    """
    n, k = weight.shape
    half = weight.scales.dtype == torch.float16
    minimums = weight.minimums is not None
    groups = (k + GROUP - 1) // GROUP
    if tuple(weight.scales.shape) != (n, groups):
        raise ValueError(f"[pack_quantized] scales must have shape {(n, groups)}, but got {tuple(weight.scales.shape)}")
    width = _C.panel_width()
    size = width * (GROUP * weight.bits // 8 + (2 if half else 4) * (1 + minimums))
    panels = torch.empty((n + width - 1) // width, groups, size, dtype=torch.uint8)
    _C.pack_quantized(weight.values, weight.scales, weight.minimums, panels, weight.bits)
    return PackedQuantizedWeight(panels, weight.bits, half, minimums, (n, k))


def quantized_linear(x: Tensor, weight: PackedQuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias for a quantised W. A row of x is rounded to 8 bits in groups of 32, each by its largest element;
    the products are exact, and groups add in float32.

    A row's result has the same bits alone, in any batch, and for any number of threads. A row with an infinity or NaN
    gives NaN.

    Args:
        x: (..., K), float32, bfloat16 or float16.
        weight: from `pack_quantized`. It has no gradient; x's goes through the dequantised weight.
        bias: (N,), x's dtype.

    Returns:
        (..., N), typed like x.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, or a weight packed for another instruction set.
    """
    if not isinstance(weight, PackedQuantizedWeight):
        raise TypeError(f"[quantized_linear] weight must come from pack_quantized, but got {type(weight).__name__}")
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _QuantizedLinear.apply(x, weight, bias)
    return _forward(x, weight, bias)


def _forward(x: Tensor, weight: PackedQuantizedWeight, bias: Tensor | None) -> Tensor:
    n, k = weight.shape
    if x.dim() and x.shape[-1] != k:
        raise ValueError(f"[quantized_linear] x (..., K) and weight (N, K) must share K, but got {tuple(x.shape)} "
                         f"and {weight.shape}")  # fmt: skip
    out = x.new_empty((*x.shape[:-1], n))
    if not x.is_contiguous():
        x = x.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    _C.quantized_linear(x, weight.panels, bias, out, weight.bits, weight.half_scales, weight.has_minimums)
    return out


class _QuantizedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.weight = weight
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = dbias = None
        rows = dy.flatten(0, -2) if dy.dim() > 1 else dy[None]
        if ctx.needs_input_grad[0]:
            k = ctx.weight.shape[1]
            dx = dy.new_empty(*dy.shape[:-1], k)
            _C.matmul(rows, ctx.weight.unpack().dequantize(), None, dx.view(len(rows), k))
        if ctx.needs_input_grad[2]:
            dbias = torch.empty(rows.shape[1], dtype=dy.dtype)
            _C.column_sum(rows if rows.stride(1) == 1 else rows.contiguous(), dbias)
        return dx, None, dbias
