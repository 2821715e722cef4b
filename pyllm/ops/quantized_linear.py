from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pyllm import _C
from pyllm.ops.gradients import Function, once_differentiable

PIECE = 32
LARGER_GROUPS = (64, 128, 256)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (N, K) of small whole numbers in groups along K, which is filled up to whole groups. Groups of more than
    32 lie in pieces of 32, and K is filled up to whole pieces. Of 8 bits, the pieces all have the group's scale. Of 4
    bits, they have scales and minimums of their own, which are whole multiples of the group's unit: 1/64 of the largest
    power of two that the elements of its pieces can reach. So an element is a whole number of units, below 128 in size,
    and many rows take as little time as with 8 bits.

    values: uint8, (N, piece * G) for 8 bits, or half as wide for 4, the first of two neighbours in a byte's low half.
    scales: (N, G), float16 or float32.
    minimums: as scales, or None. An element is value * scale + minimum, or without (value - 2^(bits - 1)) * scale.
    """

    values: Tensor
    scales: Tensor
    minimums: Tensor | None
    bits: int
    shape: tuple[int, int]  # (N, K)
    group: int = 32  # also 16, of 8 bits, or, but not of 8 bits with minimums, 64, 128 or 256

    @property
    def piece(self) -> int:
        """Elements that lie together with a scale."""
        return min(self.group, PIECE)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.scales, self.minimums) if t is not None)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The weight on another device."""
        minimums = None if self.minimums is None else self.minimums.to(device)
        return replace(self, values=self.values.to(device), scales=self.scales.to(device), minimums=minimums)

    def unpack(self) -> QuantizedWeight:
        """Itself: what `pyllm.reference.pack_quantized` leaves can be asked for the same."""
        return self

    def dequantize(self) -> Tensor:
        """The weight in float32, (N, K)."""
        values = self.values
        if self.bits == 4:
            values = torch.stack((values & 15, values >> 4), -1).flatten(1)
        grouped = values.unflatten(1, (-1, self.piece)).float()
        scales = self.scales.float()[..., None]
        if self.minimums is None:
            grouped = (grouped - 2 ** (self.bits - 1)) * scales
        else:
            grouped = grouped * scales + self.minimums.float()[..., None]
        return grouped.flatten(1)[:, : self.shape[1]]


@dataclass(frozen=True)
class PackedQuantizedWeight:
    """A `QuantizedWeight` in the order that the product reads it, made by `pack_quantized` for the instruction set in
    use then, or for CUDA, where P is 8."""

    panels: Tensor  # uint8, (N / P rounded up, G, bytes of P rows' piece)
    bits: int
    group: int
    half_scales: bool
    has_minimums: bool
    shape: tuple[int, int]
    _moved: weakref.WeakValueDictionary = field(
        default_factory=weakref.WeakValueDictionary, compare=False, repr=False
    )  # by device

    @property
    def piece(self) -> int:
        """Elements that lie together with a scale."""
        return min(self.group, PIECE)

    @property
    def nbytes(self) -> int:
        return self.panels.nbytes

    @property
    def device(self) -> torch.device:
        return self.panels.device

    @property
    def layout(self) -> tuple[int, int, bool, bool]:
        """bits, group, half_scales, has_minimums."""
        return self.bits, self.group, self.half_scales, self.has_minimums

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_moved"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _moved=weakref.WeakValueDictionary())

    @classmethod
    def of_panels(cls, panels: Tensor, layout: tuple[int, ...], shape: tuple[int, int]) -> PackedQuantizedWeight:
        """A weight packed before, for whatever instruction set: in the order of the one in use now.

        Raises:
            ValueError, TypeError: a layout that there is not, panels that are not so laid out, or scales of 4 bits in
            larger groups that are not whole multiples of a unit.
        """
        bits, group, half, minimums = layout if len(layout) == 4 else (0,) * 4
        larger = LARGER_GROUPS if bits == 4 or not minimums else ()
        known = group in (32, *larger) or (bits == 8 and group == 16)
        if bits not in (8, 4) or not known or not {half, minimums} <= {0, 1}:
            raise ValueError("[pack_quantized] layout must be 8 or 4 bits, groups of 32, 16 of 8 bits or, but not of 8 "
                             "bits with minimums, 64, 128 or 256, and whether scales are halves and there are "
                             f"minimums, but got {layout}")  # fmt: skip
        if panels.dtype != torch.uint8:
            raise TypeError(f"[pack_quantized] panels must be uint8, but got {panels.dtype}")
        packed = cls(panels.contiguous(), bits, group, bool(half), bool(minimums), shape)
        size = packed.piece * bits // 8 + (2 if half else 4) * (1 + minimums)
        width = packed.width if panels.dim() == 3 else 0
        expected = (-(-shape[0] // width), -(-shape[1] // packed.piece), width * size) if width in (8, 16, 32) else ()
        if panels.shape != expected:
            raise ValueError(f"[pack_quantized] panels of layout {layout} must be for a weight {shape}, but have shape "
                             f"{tuple(panels.shape)}")  # fmt: skip
        if bits == 4 and group > PIECE:
            checked = packed.to("cpu")
            _C.check_quantized(checked.panels, shape[0], shape[1], *checked.layout)
        return packed.to(panels.device)

    @property
    def width(self) -> int:
        """P, the rows that lie together."""
        scale = (2 if self.half_scales else 4) * (1 + self.has_minimums)
        return self.panels.shape[2] // (self.piece * self.bits // 8 + scale)

    def to(self, device: torch.device | str) -> PackedQuantizedWeight:
        """The weight on another device, in the order that its kernels read; the same one as before, as long as someone
        holds it, so that layers go on sharing it."""
        device = torch.empty(0, device=device).device
        width = _C.quantized_panel_width(device.type == "cuda")
        if device == self.panels.device and width == self.width:
            return self
        if (known := self._moved.get(device)) is not None and known.width == width:
            return known
        panels = self.panels if width == self.width else self._panels_of(width)
        moved = PackedQuantizedWeight(panels.to(device), *self.layout, self.shape)
        self._moved[device] = moved
        return moved

    def _panels_of(self, width: int) -> Tensor:
        own, few = self.width, min(width, self.width)  # rows that stay together
        splits, joins = own // few, width // few  # one of them is 1
        count, groups, size = -(-self.shape[0] // width), self.panels.shape[1], self.panels.shape[2] // own
        panels = self.panels.new_zeros(count, groups, size * width)
        values, scale = self.piece * self.bits // 8, torch.int16 if self.half_scales else torch.int32
        for part, word in ((slice(values), torch.int32), (slice(values, size), scale)):

            def words(panels: Tensor, rows: int, part: slice = part, word: torch.dtype = word) -> Tensor:
                """(panels, groups, words of a row, rows / few, few): a word of all rows in turn."""
                begin, end, _ = part.indices(size)
                return panels[..., begin * rows : end * rows].view(word).unflatten(-1, (-1, rows // few, few))

            source, out = words(self.panels, own), words(panels, width)
            for i in range(max(splits, joins)):
                to, found = out[i % splits :: splits, :, :, i % joins], source[i % joins :: joins, :, :, i % splits]
                shared = min(len(to), len(found))
                to[:shared] = found[:shared]
        return panels

    @property
    def format(self) -> str:
        """As `pyllm.quantize` names it: "int8", "int4" or "int4-min"."""
        return f"int{self.bits}" + ("-min" if self.has_minimums else "")

    def unpack(self) -> QuantizedWeight:
        """What was packed."""
        count, groups, _ = self.panels.shape
        dtype = torch.float16 if self.half_scales else torch.float32
        parts = 1 + self.has_minimums
        width = self.width
        n, rows, quads = self.shape[0], count * width, self.piece * self.bits // 32
        values, *rest = self.panels.split([width * quads * 4] + [width * dtype.itemsize] * parts, -1)
        values = values.unflatten(-1, (quads, width, 4)).permute(0, 3, 1, 2, 4).reshape(rows, groups, quads * 4)
        if self.bits == 4:  # a group's first half is in the low bits
            halves = torch.cat((values & 15, values >> 4), -1).unflatten(-1, (16, 2))
            values = halves[..., 0] | halves[..., 1] << 4
        scales = [t.contiguous().view(dtype).transpose(1, 2).reshape(rows, groups)[:n].contiguous() for t in rest]
        return QuantizedWeight(values.flatten(1)[:n].contiguous(), scales[0], scales[1] if self.has_minimums else None,
                               self.bits, self.shape, self.group)  # fmt: skip


def pack_quantized(weight: QuantizedWeight) -> PackedQuantizedWeight:
    """Packs a quantised weight for `quantized_linear` and `quantized_embedding`, where it is; on the CPU, and moved, if
    that is a CUDA device.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit the others, or scales or minimums of 4 bits in larger
            groups that are not whole multiples of a unit.
    """
    if not weight.values.is_cuda:
        return pack_pieces([weight], weight.shape[0])
    return pack_pieces([weight.to("cpu")], weight.shape[0]).to(weight.device)


def pack_pieces(pieces: Iterable[QuantizedWeight], rows: int) -> PackedQuantizedWeight:
    """Packs a weight of so many rows that comes some rows after the other, so that it is never held twice."""
    packed: PackedQuantizedWeight | None = None
    left: list[Tensor] = []
    width, done = _C.panel_width(), 0
    for piece in pieces:
        empty = _empty(piece, rows)
        if packed is None:
            packed = empty
        elif (packed.layout, packed.shape) != (empty.layout, empty.shape):
            raise ValueError("[pack_quantized] all rows must be of one format and width")
        parts = [t for t in (piece.values, piece.scales, piece.minimums) if t is not None]
        if left:
            parts = [torch.cat(pair) for pair in zip(left, parts, strict=True)]
        count = len(parts[1])
        whole = count if done + count == rows else count // width * width  # a panel is filled at once
        left = [] if whole == count else [t[whole:].clone() for t in parts]
        values, scales, *minimums = (t[:whole] for t in parts)
        panels = packed.panels[done // width : -(-(done + whole) // width)]
        _C.pack_quantized(values, scales, minimums[0] if minimums else None, panels, piece.bits, piece.group)
        done += whole
    if packed is None or done != rows:
        raise ValueError(f"[pack_quantized] pieces must have {rows} rows together, but got {done}")
    return packed


def _empty(like: QuantizedWeight, rows: int) -> PackedQuantizedWeight:
    """With memory, which costs nothing until it is written, for a weight of so many rows."""
    n, k = like.shape
    groups, width = -(-k // like.piece), _C.panel_width()
    if tuple(like.scales.shape) != (n, groups):
        raise ValueError(f"[pack_quantized] scales must have shape {(n, groups)}, but got {tuple(like.scales.shape)}")
    if len(like.values) > n:  # what is cut to panels must not lose rows unseen
        raise ValueError(f"[pack_quantized] values must have {n} rows, but got {len(like.values)}")
    if like.minimums is not None and tuple(like.minimums.shape) != (n, groups):
        found = tuple(like.minimums.shape)
        raise ValueError(f"[pack_quantized] minimums must have shape {(n, groups)}, but got {found}")
    half, minimums = like.scales.dtype == torch.float16, like.minimums is not None
    size = width * (like.piece * like.bits // 8 + (2 if half else 4) * (1 + minimums))
    panels = torch.empty(-(-rows // width), groups, size, dtype=torch.uint8)
    return PackedQuantizedWeight(panels, like.bits, like.group, half, minimums, (rows, k))


def quantized_linear(x: Tensor, weight: PackedQuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """x @ W.T + bias for a quantised W. A row of x is rounded to 8 bits in the weight's groups (on CUDA, in pieces of
    them), each by its largest element; the products are exact, and groups add in float32.

    A row's result has the same bits alone, in any batch, and for any number of threads. A row with an infinity or NaN
    gives NaN. On a CUDA device 8 rows and fewer read the weight at memory's speed, more are products of bytes on the
    matrix units; the gradient is a plain product there.

    Args:
        x: (..., K), float32, bfloat16 or float16.
        weight: from `pack_quantized`. It has no gradient; x's goes through the dequantised weight, some rows at a time.
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
    out = x.new_empty(*x.shape[:-1], n)
    if not x.is_contiguous():
        x = x.contiguous()
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    _C.quantized_linear(x, weight.panels, bias, out, *weight.layout)
    return out


class _QuantizedLinear(Function):
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
            wide = torch.empty(len(rows), ctx.weight.shape[1], device=dy.device)
            _C.quantized_linear_backward(rows if rows.stride(1) == 1 else rows.contiguous(), ctx.weight.panels, wide,
                                         *ctx.weight.layout)  # fmt: skip
            dx = wide.view(*dy.shape[:-1], wide.shape[1]).to(dy.dtype)
        if ctx.needs_input_grad[2]:
            dbias = dy.new_empty(rows.shape[1])
            _C.column_sum(rows if rows.stride(1) == 1 else rows.contiguous(), dbias)
        return dx, None, dbias
