"""What reads the weights of a checkpoint, one at a time, whatever its format.

A reader knows the dtype and shape of every weight before it reads any, and takes no memory beyond the tensor that it
fills and one small piece. Weights that are used as the file has them can be mapped: no more is read than is used, and
who writes to them gets a copy, a page at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pyllm import ops
from pyllm.checkpoint.files import CheckpointError, map_file, short

_PIECE = 1 << 20  # values converted at a time


class Entry(NamedTuple):
    """What a checkpoint says of a weight. Packed weights count as the float32 that they are widened to."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class Extent(NamedTuple):
    """Where a weight lies in a file."""

    file: FileIO
    begin: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    change: Callable[[Tensor], object] | None = None  # makes of the values in the file those of the weight, in place


class FileReader:
    """Reads weights, by the names that a family's table has for them, from where they lie in open files.

    Closed by `close`, or at the end of a `with`. With `mapped`, the files must stay as they are meanwhile, and for as
    long as what `map` gave is used; `maps` are of those that are mapped already.
    """

    def __init__(self, extents: dict[str, Extent], files: list[FileIO], *, mapped: bool = False,
                 maps: dict[FileIO, mmap.mmap] | None = None):  # fmt: skip
        self._extents, self._files, self._mapped = extents, files, mapped
        self._maps = {} if maps is None else maps

    def entries(self) -> dict[str, Entry]:
        return {name: Entry(extent.dtype, extent.shape) for name, extent in self._extents.items()}

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        """Reads a weight into `out`, which is contiguous and of its shape, or into a new tensor.

        An `out` of another float dtype gets the values rounded to it. One that is a contiguous tensor transposed gets
        those of a weight that can be mapped.

        Raises:
            KeyError: there is no such weight.
            ValueError: `out` is of another shape, not contiguous, or of a dtype that cannot hold the values.
            CheckpointError: the file has become shorter.
        """
        extent = self._extents[name]
        if out is None:
            out = torch.empty(extent.shape, dtype=extent.dtype)
        turned = out.dim() == 2 and self.map([name]) is not None
        check_out(name, Entry(extent.dtype, extent.shape), out, turned)
        with torch.no_grad():
            stored = out
            if extent.change is not None and out.dtype != extent.dtype:
                stored = torch.empty(extent.shape, dtype=extent.dtype)
            self._fill(name, extent, stored)
            if extent.change is not None:
                extent.change(stored)
            if stored is not out:
                out.copy_(stored)
        return out

    def map(self, names: Sequence[str]) -> Tensor | None:
        """Weights of one dtype, joined along their first dimension, where they lie in the file: no copy, until they are
        written to.

        Returns:
            None where that cannot be: they do not lie one behind the other, or not as they are to be used, or the
            reader is not `mapped`.
        """
        if not self._mapped:
            return None
        extents = [self._extents[name] for name in names]
        first = extents[0]
        at = first.begin
        for extent in extents:
            if extent.file is not first.file or extent.begin != at or extent.change is not None:
                return None
            at += math.prod(extent.shape) * first.dtype.itemsize
        if first.begin % first.dtype.itemsize or at == first.begin:
            return None
        if first.file not in self._maps:
            self._maps[first.file] = map_file(first.file)
        file, count = self._maps[first.file], (at - first.begin) // first.dtype.itemsize
        flat = torch.frombuffer(file, dtype=first.dtype, count=count, offset=first.begin)
        shape = first.shape if len(names) == 1 else (sum(extent.shape[0] for extent in extents), *first.shape[1:])
        return flat.view(shape)

    def _fill(self, name: str, extent: Extent, out: Tensor) -> None:
        mapped = self.map([name])
        if mapped is not None:  # threads copy and convert it
            if out.is_contiguous() or out.dtype != mapped.dtype:
                out.copy_(mapped)
            else:
                ops.elementwise("copy", mapped.T, out=out.T)
            begin, end = -(-extent.begin // mmap.PAGESIZE), (extent.begin + mapped.nbytes) // mmap.PAGESIZE
            if end > begin:
                self._maps[extent.file].madvise(mmap.MADV_DONTNEED, begin * mmap.PAGESIZE,
                                                (end - begin) * mmap.PAGESIZE)  # fmt: skip
            return
        extent.file.seek(extent.begin)
        for piece in _pieces(out, extent.dtype):
            fill(extent.file, piece, name)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


class MemoryReader:
    """Tensors that are in memory already, each of which can be read once: it is then the reader's no longer."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors, self._kept = tensors, 0
        self._most = sum(tensor.nbytes for tensor in tensors.values()) // 64

    def entries(self) -> dict[str, Entry]:
        return {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in self._tensors.items()}

    def read(self, name: str, out: Tensor | None = None) -> Tensor:
        tensor = self._tensors[name]
        if out is not None:
            check_out(name, Entry(tensor.dtype, tuple(tensor.shape)), out)
            with torch.no_grad():
                out.copy_(tensor)
            self._kept += tensor.nbytes
        del self._tensors[name]
        if out is None:
            return tensor
        del tensor
        if self._kept > self._most:
            _give_back()
            self._kept = 0
        return out

    def map(self, names: Sequence[str]) -> Tensor | None:
        """None: there is no file to map."""
        return None

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self._tensors = {}


def _give_back() -> None:
    """glibc keeps what is freed, unless it was 32 MB at once: this hands it back to the system."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def open_file(path: Path) -> tuple[FileIO, int]:
    """A file and its size."""
    try:
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (the reader closes it)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing from its checkpoint") from None
    return file, os.fstat(file.fileno()).st_size


def fill(file: FileIO, out: Tensor, name: str) -> None:
    """Fills a flat tensor with the next bytes of a file."""
    data = memoryview(out.view(torch.uint8).numpy().data)
    done = 0
    while done < len(data):
        read = file.readinto(data[done:])
        if not read:
            raise CheckpointError(
                f"{file.name}: {short(name)} must have {len(data) - done} more bytes, but the file ends"
            )
        done += read


def check_out(name: str, entry: Entry, out: Tensor, turned: bool = False) -> None:
    """`turned`: whether out may be a contiguous tensor transposed."""
    if tuple(out.shape) != entry.shape or not (out.is_contiguous() or (turned and out.T.is_contiguous())):
        raise ValueError(f"[read] out must be contiguous and of {name}'s shape {entry.shape}, but got one of shape "
                         f"{tuple(out.shape)} and strides {out.stride()}")  # fmt: skip
    if out.dtype != entry.dtype and not (out.is_floating_point() and entry.dtype.is_floating_point):
        raise ValueError(f"[read] out must hold {name}'s {entry.dtype}, but got {out.dtype}")


def halves(weight: Tensor, heads: int) -> None:
    """Puts query or key rows whose rotary pairs are neighbours half a head apart, as Hugging Face has them."""
    for head in weight.view(heads, -1, *weight.shape[1:]):  # one after the other, to hold little
        head.copy_(head.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1))


def neighbours(weight: Tensor, heads: int) -> Tensor:
    """The reverse of `halves`."""
    return weight.view(heads, 2, -1, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def check_extents(where: str, extents: list[tuple[int, int, str]], size: int, alignment: int = 1) -> None:
    """Raises unless (begin, end, name) lie one behind the other, each aligned, and fill `size` bytes."""
    last = end = 0
    for begin, behind, name in sorted(extents):
        if begin != end:
            raise CheckpointError(f"{where}: {short(name)} must begin at byte {end}, but does at {begin}")
        last, end = behind, -(-behind // alignment) * alignment
    if not last <= size <= end:
        raise CheckpointError(f"{where} must have {end} bytes behind its header, but has {size}")


def _pieces(out: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The parts of `out` to fill in order: itself, or pieces of another dtype that are then copied into it."""
    flat = out.detach().view(-1)
    if flat.dtype == dtype and flat.device.type == "cpu":
        yield flat
        return
    piece = torch.empty(min(_PIECE, len(flat)), dtype=dtype)
    for begin in range(0, len(flat), _PIECE):
        part = flat[begin : begin + _PIECE]
        yield piece[: len(part)]
        part.copy_(piece[: len(part)])
