from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakIdKeyDictionary

from pyllm import _C
from pyllm.ops.gradients import Function, once_differentiable


@dataclass(frozen=True)
class PackedLinear:
    """A weight in the order that the products read it, made by `pack_linear` for the instruction set in use then."""

    panels: Tensor  # (N / P rounded up, K, P); of 16-bit types K rounded up to 32, by pairs of its elements
    shape: tuple[int, int]  # (N, K)


def pack_linear(weight: Tensor) -> PackedLinear:
    """Packs a weight once, for inference: `linear` takes the result in place of the weight and gives the same bits.

    Args:
        weight: (N, K), float32, bfloat16 or float16; stored as it is typed.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit.
    """
    packed = _blank(weight)
    _C.pack_linear(weight, packed.panels)
    return packed


def _blank(weight: Tensor) -> PackedLinear:
    width = _C.panel_width()
    n, k = weight.shape if weight.dim() == 2 else (0, 0)
    rows = k if weight.dtype == torch.float32 else (k + 31) // 32 * 32
    return PackedLinear(torch.empty((n + width - 1) // width, rows, width, dtype=weight.dtype), (n, k))


def linear(x: Tensor, weight: Tensor | PackedLinear, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias, accumulated in float32.

    On the CPU a row's result has the same bits alone, in any batch, for any number of threads, and for a packed weight.
    On a CUDA device the product and its gradients are torch's (cuBLAS), which promises no such thing.

    Args:
        x: (..., K), float32, bfloat16 or float16, of any strides.
        weight: (N, K), x's dtype; or what `pack_linear` made of it, which has no gradients.
        bias: (N,), x's dtype.

    Returns:
        (..., N), typed like x.

    Raises:
        ValueError, TypeError: a shape or dtype that does not fit, or a weight packed for another instruction set.
    """
    if x.is_cuda:
        return _on_cuda(x, weight, bias)
    grad = torch.is_grad_enabled()
    if isinstance(weight, PackedLinear):
        if grad and (x.requires_grad or (bias is not None and bias.requires_grad)):
            raise ValueError("[linear] a packed weight has no gradients: x and bias must not require one")
        if x.dim() and x.shape[-1] != weight.shape[1]:
            raise ValueError(
                f"[linear] x (..., K) and weight (N, K) must share K, but got {tuple(x.shape)} and {weight.shape}"
            )
        return _forward(x, weight.panels, bias, weight.shape[0], True)
    if grad and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _Linear.apply(x, weight, bias)
    copy = copy_for_replays(weight) if _C.recording() else _known_copy(weight) if _reading.copies else None
    if copy is not None:
        return _forward(x, copy.panels, bias, weight.shape[0], True)
    return _forward(x, weight, bias, weight.shape[0] if weight.dim() else 0, False)


def _on_cuda(x: Tensor, weight: Tensor | PackedLinear, bias: Tensor | None) -> Tensor:
    if isinstance(weight, PackedLinear):
        raise NotImplementedError("[linear] a packed weight must be used on the cpu, but x is on a CUDA device")
    for name, t in (("weight", weight), ("bias", bias)):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise TypeError(f"[linear] {name} must be {x.dtype} on {x.device}, but got {t.dtype} on {t.device}")
    if weight.dim() != 2 or x.dim() < 1 or weight.shape[1] != x.shape[-1]:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ValueError(f"[linear] x (..., K) and weight (N, K) must share K, but got {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"[linear] bias must have shape {tuple(weight.shape[:1])}, but got {tuple(bias.shape)}")
    return torch.nn.functional.linear(x, weight, bias)


_ROOM = 64 << 20  # bytes that the copies may take together, but for those of weights in a mapped file
_PART = 64 << 20  # bytes of a mapped weight that are copied, and then given back
_copies: Any = WeakIdKeyDictionary()  # weight -> (its version and where it lay, the copy)
_copying = threading.Lock()  # models are recorded by several threads


def copy_for_replays(weight: Tensor) -> PackedLinear | None:
    """A packed copy of a parameter, which a recorded step reads in its place: from a cache, one row goes through it
    about three times as fast. None where that does not pay, as in 16 bits with tile registers, or the copies would
    outgrow their room."""
    constant = isinstance(weight, torch.nn.Parameter) and weight.device.type == "cpu"
    if not constant or weight.dim() != 2 or (weight.dtype != torch.float32 and _C.info()["amx"]):
        return None
    with _copying:
        known = _known_copy(weight)
        if known is not None:
            return known
        _copies.pop(weight, None)
        if not _fits(weight):
            return None
        with _disable_current_modes():  # it outlives the recording, and is not of the step
            copy = _pack_from_file(weight.detach()) if _in_file(weight) else pack_linear(weight)
        _copies[weight] = _state(weight), copy
        return copy


class _Reading(threading.local):
    copies = False


_reading = _Reading()


@contextlib.contextmanager
def reading_copies() -> Iterator[None]:
    """Within, this thread's calls without gradients read the copies that recorded steps do, in place of weights whose
    pages were given back to their file. (Elsewhere they read the weights: copies miss what is written to `data`.)"""
    before, _reading.copies = _reading.copies, True
    try:
        yield
    finally:
        _reading.copies = before


def _known_copy(weight: Tensor) -> PackedLinear | None:
    """The copy of a parameter as it is now, for the instruction set in use, where there is one."""
    state, copy = _copies.get(weight, (None, None)) if _copies else (None, None)
    return copy if copy and state == _state(weight) and copy.panels.shape[2] == _C.panel_width() else None


def _state(weight: Tensor) -> tuple[int, int]:
    return weight._version, weight.data_ptr()  # what is assigned to its `data` leaves the version as it was


def _in_file(weight: Tensor) -> bool:
    return not weight.untyped_storage().resizable()  # a mapped one; what is copied from it is given back to it


def _pack_from_file(weight: Tensor) -> PackedLinear:
    """As `pack_linear`, but the file's pages are given back, of a large weight part by part."""
    packed, width = _blank(weight), _C.panel_width()
    part = max(_PART // max(weight[:1].nbytes, 1) // width * width, width) if weight.is_contiguous() else len(weight)
    for rows, panels in zip(weight.split(part), packed.panels.split(-(-part // width)), strict=True):
        _C.pack_linear(rows, panels)
        _C.give_back_file_pages(rows)
    return packed


def _fits(weight: Tensor) -> bool:
    """Whether there is room for a copy: together, those of files' weights may take a quarter of what was available
    before there were any."""
    in_file = _in_file(weight)
    held = sum(copy.panels.nbytes for other, (_, copy) in _copies.items() if _in_file(other) == in_file)
    return held + weight.nbytes <= (_quarter(held) if in_file else _ROOM)


def _quarter(held: int) -> int:
    try:
        with open("/proc/meminfo") as file:
            available = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return 0
    return (available * 1024 + held) // 4


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, n: int, packed: bool) -> Tensor:
    out = x.new_empty(*x.shape[:-1], n)
    if x.dim() > 2 and not x.is_contiguous():
        x = x.flatten(0, -2)
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    _C.linear(x, weight, bias, out, packed)
    return out


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.flatten(0, -2) if t.dim() > 1 else t[None]


class _Linear(Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias, weight.shape[0] if weight.dim() else 0, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, gradients = _rows(x), _rows(dy)
        dx = dweight = dbias = None
        if needs_x:
            dx = torch.empty(rows.shape, dtype=dy.dtype)
            _C.matmul(gradients, weight, None, dx)
            dx = dx.view(x.shape)
        if needs_weight:
            dweight = torch.empty(weight.shape, dtype=dy.dtype)
            _C.matmul(gradients.T, rows, None, dweight)
        if needs_bias:
            dbias = torch.empty(gradients.shape[1], dtype=dy.dtype)
            _C.column_sum(gradients if gradients.stride(1) == 1 else gradients.contiguous(), dbias)
        return dx, dweight, dbias
