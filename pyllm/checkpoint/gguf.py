"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, read with distrust.

Every count, length and offset is checked against the size of the file before anything is made of it. Packed weights are
kept so, or widened to float32, a piece at a time, by the `gguf` package, which is needed for them only.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader, FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyllm.checkpoint.architectures import ARCHITECTURES, SLOWING, TENSORS, Architecture
from pyllm.checkpoint.files import CheckpointError, short
from pyllm.checkpoint.gguf_packed import KINDS, Layout, unpacked
from pyllm.checkpoint.reader import Entry, Extent, FileReader, check_extents, fill, halves, open_file
from pyllm.ops import QuantizedWeight

_PIECE = 1 << 17  # values widened at a time
_UNPACKED = 1 << 18  # values that stay packed in another order, at a time
_PANEL = 32  # rows that any instruction set packs together, or a multiple of them
_MOST_DIMENSIONS, _LONGEST_NAME, _LARGEST_ALIGNMENT = 4, 65535, 1 << 16
_MOST_EXPERTS = 1024


class _Packing(NamedTuple):
    name: str
    values: int  # a block's
    bytes: int
    dtype: torch.dtype | None = None  # None: packed


_PACKINGS = {
    0: _Packing("F32", 1, 4, torch.float32),
    1: _Packing("F16", 1, 2, torch.float16),
    2: _Packing("Q4_0", 32, 18),
    3: _Packing("Q4_1", 32, 20),
    6: _Packing("Q5_0", 32, 22),
    7: _Packing("Q5_1", 32, 24),
    8: _Packing("Q8_0", 32, 34),
    10: _Packing("Q2_K", 256, 84),
    11: _Packing("Q3_K", 256, 110),
    12: _Packing("Q4_K", 256, 144),
    13: _Packing("Q5_K", 256, 176),
    14: _Packing("Q6_K", 256, 210),
    30: _Packing("BF16", 1, 2, torch.bfloat16),
}
_NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 10: "<u8", 11: "<i8", 12: "<f8"}
_BOOL, _STRING, _ARRAY = 7, 8, 9


class GGUFReader(FileReader):
    """A GGUF file's metadata, and its weights by GGUF's names; those of a mixture's experts one by one.

    Attributes:
        metadata: strings, numbers, booleans, lists of strings, and NumPy arrays of numbers and booleans.
    """

    def __init__(self, path: Path, file: FileIO, metadata: dict[str, Any], extents: dict[str, Extent],
                 packings: dict[str, int], mapped: bool):  # fmt: skip
        super().__init__(extents, [file], mapped=mapped)
        self._path, self.metadata, self._packings = path, metadata, packings

    @property
    def architecture(self) -> Architecture:
        """The table of its architecture.

        Raises:
            CheckpointError: there is none here.
        """
        found = _architecture(self.metadata)
        if found is None:
            raise CheckpointError(f"{self._path}: general.architecture must be one of {', '.join(ARCHITECTURES)}, "
                                  f"but is {short(self.metadata.get('general.architecture'))}")  # fmt: skip
        return found

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of the model.

        Raises:
            CheckpointError: an architecture that is not known here, or a value that is missing or makes no sense.
        """
        table = self.architecture
        prefix = f"{table.model_type}."
        config = {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}
        config[TENSORS] = {name: entry.shape for name, entry in self.entries().items()}
        if SLOWING in self._extents:
            config[SLOWING] = self.read(SLOWING, torch.empty(self._extents[SLOWING].shape))
        try:
            return table.config(config)
        except ValueError as e:
            raise CheckpointError(f"{self._path}: {e}") from None

    @property
    def kinds(self) -> Counter[str]:
        """How many weights there are of each of GGML's kinds."""
        plain = {packing.dtype: packing.name for packing in _PACKINGS.values() if packing.dtype is not None}
        return Counter(
            _PACKINGS[self._packings[name]].name if name in self._packings else plain[entry.dtype]
            for name, entry in self.entries().items()
        )

    @property
    def dtype(self) -> torch.dtype:
        """That of most values: norms are float32 in every file, and a model is of one dtype."""
        values: Counter[torch.dtype] = Counter()
        for entry in self.entries().values():
            values[entry.dtype] += math.prod(entry.shape)
        return values.most_common(1)[0][0] if values else torch.float32

    def entries(self) -> dict[str, Entry]:
        return {name: entry for name, entry in super().entries().items() if name != SLOWING}

    def layout(self, name: str) -> Layout | None:
        """How a packed weight can be held as it is; None where it cannot, or is not packed."""
        kind = _PACKINGS[self._packings[name]].name if name in self._packings else ""
        change = self._extents[name].change
        ordered = change is None or getattr(change, "func", None) is halves
        return KINDS[kind] if kind in KINDS and ordered and len(self._extents[name].shape) == 2 else None

    def read_packed(self, name: str, layout: tuple[int, int, bool, bool]) -> Iterator[QuantizedWeight]:
        """A packed weight, some rows after the other.

        Raises:
            CheckpointError: the file has become shorter, or a scale is not finite.
        """
        extent, packing = self._extents[name], _PACKINGS[self._packings[name]]
        (rows, k), change = extent.shape, extent.change
        blocks = k // packing.values
        heads = change.keywords["heads"] if isinstance(change, functools.partial) else rows
        unit = rows // max(heads, 1)  # rows that are put in order together
        whole = math.lcm(max(unit, 1), _PANEL)  # rows after which a piece can end
        step = max(1, _UNPACKED // max(k * whole, 1)) * whole
        for begin in range(0, rows, step):
            count = min(step, rows - begin)
            raw = torch.empty(count, blocks, packing.bytes, dtype=torch.uint8)
            extent.file.seek(extent.begin + begin * blocks * packing.bytes)
            fill(extent.file, raw.view(-1), name)
            turn = None if change is None else functools.partial(halves, heads=count // unit)
            try:
                yield unpacked(packing.name, raw, Layout(*layout), turn)
            except ValueError as e:
                raise CheckpointError(f"{self._path}: {short(name)} of {e}") from None

    def map(self, names: Sequence[str]) -> Tensor | None:
        return None if self._packings.keys() & set(names) else super().map(names)

    def _fill(self, name: str, extent: Extent, out: Tensor) -> None:
        if name not in self._packings:
            super()._fill(name, extent, out)
            return
        from gguf import GGMLQuantizationType, quants

        kind = self._packings[name]
        packing = _PACKINGS[kind]
        flat, step = out.detach().view(-1), _PIECE // packing.values
        blocks = len(flat) // packing.values
        raw = torch.empty(min(step, blocks) * packing.bytes, dtype=torch.uint8)
        extent.file.seek(extent.begin)
        for begin in range(0, blocks, step):
            count = min(step, blocks - begin)
            piece = raw[: count * packing.bytes]
            fill(extent.file, piece, name)
            with np.errstate(all="ignore"):
                values = quants.dequantize(piece.numpy().reshape(count, -1), GGMLQuantizationType(kind))
            at = begin * packing.values
            flat[at : at + count * packing.values].copy_(torch.from_numpy(values).view(-1))


def open_gguf(path: Path, *, mapped: bool = False) -> GGUFReader:
    """Reads the metadata of a GGUF file, and where its weights are.

    Raises:
        CheckpointError: the file is truncated, damaged, or of a version or packing that is not known here.
        ImportError: the weights are packed, and the package `gguf` is not there.
    """
    file, size = open_file(path)
    try:
        metadata, extents, packings = _contents(path, file, size)
        if packings and importlib.util.find_spec("gguf") is None:
            kinds = ", ".join(sorted({_PACKINGS[kind].name for kind in packings.values()}))
            raise ImportError(f"{path} has weights packed as {kinds}, which need the package gguf: "
                              "pip install pyllm[gguf]")  # fmt: skip
    except BaseException:
        file.close()
        raise
    return GGUFReader(path, file, metadata, extents, packings, mapped)


class _Cursor:
    """Takes values from the beginning of a file, and never more than the file has."""

    def __init__(self, path: Path, file: FileIO, size: int):
        self.where, self.at, self.size = str(path), 0, size
        self._file = BufferedReader(file, 1 << 16)

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            raise CheckpointError(f"{self.where}: {what} at byte {self.at} must have {count} bytes, "
                                  f"but the file has {self.size - self.at} more")  # fmt: skip
        data = self._file.read(count)
        if len(data) != count:
            raise CheckpointError(f"{self.where} has become shorter while it was read")
        self.at += count
        return data

    def u32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "little")

    def u64(self, what: str) -> int:
        return int.from_bytes(self.take(8, what), "little")

    def count(self, what: str, least: int) -> int:
        """How many of something follow, of which each has at least so many bytes."""
        count = self.u64(what)
        if count * least > self.size - self.at:
            raise CheckpointError(
                f"{self.where}: {what} of {count} must fit the file's {self.size - self.at} more bytes"
            )
        return count

    def string(self, what: str, longest: int | None = None) -> str:
        length = self.u64(what)
        if longest is not None and length > longest:
            raise CheckpointError(f"{self.where}: {what} must have at most {longest} bytes, but has {length}")
        return self.text(self.take(length, what), what)

    def text(self, data: bytes, what: str) -> str:
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as e:
            raise CheckpointError(f"{self.where}: {what} must be UTF-8, but: {e.reason}") from None

    def value(self, kind: int, what: str) -> Any:
        if kind in _NUMBERS:
            number = np.frombuffer(self.take(np.dtype(_NUMBERS[kind]).itemsize, what), _NUMBERS[kind])[0].item()
            if not math.isfinite(number):
                raise CheckpointError(f"{self.where}: {what} must be finite, but is {number}")
            return number
        if kind == _BOOL:
            return bool(self._booleans(1, what)[0])
        if kind == _STRING:
            return self.string(what)
        if kind != _ARRAY:
            raise CheckpointError(f"{self.where}: {what} must be of a type up to 12, but is of {kind}")
        kind = self.u32(what)
        if kind in _NUMBERS:
            count = self.count(what, np.dtype(_NUMBERS[kind]).itemsize)
            return np.frombuffer(self.take(count * np.dtype(_NUMBERS[kind]).itemsize, what), _NUMBERS[kind])
        if kind == _BOOL:
            return self._booleans(self.count(what, 1), what)
        if kind == _STRING:
            return [self.string(what) for _ in range(self.count(what, 8))]
        raise CheckpointError(
            f"{self.where}: {what} must be an array of numbers, booleans or strings, but is of {kind}"
        )

    def _booleans(self, count: int, what: str) -> np.ndarray:
        values = np.frombuffer(self.take(count, what), np.uint8)
        if count and values.max() > 1:
            raise CheckpointError(f"{self.where}: {what} must hold booleans, but has a byte of {values.max()}")
        return values.astype(bool)

    def finish(self) -> None:
        self._file.detach()


def _contents(path: Path, file: FileIO, size: int) -> tuple[dict[str, Any], dict[str, Extent], dict[str, int]]:
    cursor = _Cursor(path, file, size)
    try:
        if (magic := cursor.take(4, "the magic number")) != b"GGUF":
            raise CheckpointError(f"{path} must begin with GGUF, but does with {magic!r}")
        if (version := cursor.u32("the version")) not in (2, 3):
            raise CheckpointError(f"{path} must be GGUF of version 2 or 3, little-endian, but is of {version}")
        tensors = cursor.count("the number of tensors", 32 - 8)
        pairs = cursor.count("the number of metadata", 13)
        metadata: dict[str, Any] = {}
        for i in range(pairs):
            key = cursor.string(f"key {i}", _LONGEST_NAME)
            if key in metadata:
                raise CheckpointError(f"{path} must have each key once, but has {short(key)} twice")
            metadata[key] = cursor.value(cursor.u32(short(key)), short(key))
        infos: dict[str, tuple[int, tuple[int, ...], int, int]] = {}
        for i in range(tensors):
            name = cursor.string(f"the name of tensor {i}", _LONGEST_NAME)
            if name in infos:
                raise CheckpointError(f"{path} must have each name once, but has {short(name)} twice")
            infos[name] = _info(cursor, name)
    finally:
        cursor.finish()
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 8 <= alignment <= _LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment must be a power of 2 in [8, {_LARGEST_ALIGNMENT}], "
                              f"but is {short(alignment)}")  # fmt: skip
    begin = -(-cursor.at // alignment) * alignment
    check_extents(str(path), [(offset, offset + nbytes, name) for name, (_, _, offset, nbytes) in infos.items()],
                  max(size - begin, 0), alignment)  # fmt: skip

    extents: dict[str, Extent] = {}
    packings: dict[str, int] = {}
    for name, (kind, shape, offset, nbytes) in infos.items():
        packing = _PACKINGS[kind]
        change = _change(path, metadata, name, shape)
        parts = [(name, 0, shape)]
        if experts := re.fullmatch(r"(blk\.[0-9]+\.ffn_(?:gate|up|down))_exps\.weight", name):
            if len(shape) != 3 or not 1 <= shape[0] <= _MOST_EXPERTS:
                raise CheckpointError(f"{path}: {short(name)} must be of at most {_MOST_EXPERTS} matrices, "
                                      f"but is of shape {shape}")  # fmt: skip
            size = nbytes // shape[0]
            parts = [(f"{experts[1]}.{e}.weight", e * size, shape[1:]) for e in range(shape[0])]
        for part, at, of in parts:
            if part in extents:
                raise CheckpointError(f"{path} must have each name once, but has {short(part)} twice")
            extents[part] = Extent(file, begin + offset + at, packing.dtype or torch.float32, of, change)
            if packing.dtype is None:
                packings[part] = kind
    return metadata, extents, packings


def _architecture(metadata: dict[str, Any]) -> Architecture | None:
    name = metadata.get("general.architecture")
    return ARCHITECTURES.get(name) if isinstance(name, str) else None


def _change(path: Path, metadata: dict[str, Any], name: str, shape: tuple[int, ...]) -> Callable | None:
    """What makes our weight of a tensor."""
    table = _architecture(metadata)
    if table is not None and table.one_plus and name.endswith("norm.weight"):
        return functools.partial(Tensor.sub_, other=1)
    rotated = re.fullmatch(r"blk\.[0-9]+\.attn_([qk])\.(?:weight|bias)", name)
    if table is None or not table.rotary_pairs or not rotated:
        return None
    key = f"{table.model_type}.attention.head_count"
    heads = metadata.get(key)
    if rotated[1] == "k":
        heads = metadata.get(f"{key}_kv", heads)
    if type(heads) is not int or heads < 1 or shape[0] % (2 * heads):
        raise CheckpointError(f"{path}: {short(name)} must have rows for {short(heads)} heads of even size, "
                              f"but is of shape {shape}")  # fmt: skip
    return functools.partial(halves, heads=heads)


def _info(cursor: _Cursor, name: str) -> tuple[int, tuple[int, ...], int, int]:
    """A tensor's packing, shape, offset and size."""
    where = f"{cursor.where}: {short(name)}"
    dimensions = cursor.u32(name)
    if not 1 <= dimensions <= _MOST_DIMENSIONS:
        raise CheckpointError(f"{where} must have 1 to {_MOST_DIMENSIONS} dimensions, but has {dimensions}")
    shape = struct.unpack(f"<{dimensions}Q", cursor.take(8 * dimensions, name))[::-1]
    kind, offset = cursor.u32(name), cursor.u64(name)
    if kind not in _PACKINGS:
        known = ", ".join(packing.name for packing in _PACKINGS.values())
        raise CheckpointError(f"{where} must be one of {known}, but is of GGML's type {kind}")
    packing = _PACKINGS[kind]
    if shape[-1] % packing.values:
        raise CheckpointError(f"{where} of {packing.name} must have rows of whole blocks of {packing.values}, "
                              f"but has rows of {shape[-1]}")  # fmt: skip
    nbytes = math.prod(shape) // packing.values * packing.bytes
    if math.prod(n for n in shape if n) >= 2**63 or nbytes > cursor.size:
        raise CheckpointError(f"{where} of {packing.name} and shape {shape} must have {nbytes} bytes, "
                              f"but the file has {cursor.size}")  # fmt: skip
    return kind, shape, offset, nbytes
