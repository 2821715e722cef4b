"""Safetensors files (https://github.com/huggingface/safetensors), single or in shards, read with distrust."""

from __future__ import annotations

import json
import math
import struct
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyllm.checkpoint.files import (
    LARGEST_JSON,
    CheckpointError,
    Seal,
    check_open,
    map_file,
    parse_json,
    read_json,
    short,
)
from pyllm.checkpoint.reader import Extent, FileReader, check_extents, open_file

_ALIGNMENT = 64
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


def check_tensors(tensors: dict[str, Tensor], where: str) -> None:
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise TypeError(f"{where} must map names to tensors, but got {name!r}: {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.dtype not in _DTYPES.values():
            raise TypeError(
                f"{where}: {name} must be a dense tensor of a dtype that safetensors has, "
                f"but got {tensor.dtype}, {tensor.layout}, on {tensor.device}"
            )


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Writes a safetensors file, one tensor after the other; tensors that share memory each on its own.

    Tensors lie in the order given, so that those that follow each other can be mapped as one, but for those whose sizes
    would put others out of step: all are aligned to their elements, and what can be to 64 bytes.
    """

    def out_of_step(name: str) -> tuple[bool, int]:
        return tensors[name].nbytes % _ALIGNMENT != 0, -tensors[name].itemsize

    kinds = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without which transformers refuses it
    names, end = sorted(tensors, key=out_of_step), 0
    for name in names:
        begin, end = end, end + tensors[name].nbytes
        header[name] = {"dtype": kinds[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [begin, end]}  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            file.write(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)


def read_tensors(path: Path, expected: Seal | None = None, *, mapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in memory of their own or, mapped, in the pages of the file.

    Raises:
        CheckpointError: the file is not as `expected`, or truncated, or its header does not describe it.
    """
    with open_tensors(path, expected, mapped=mapped) as reader:
        tensors: dict[str, Tensor] = {}
        for name in reader.entries():
            found = reader.map([name])
            tensors[name] = reader.read(name) if found is None else found
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bool and tensor.numel() and tensor.view(torch.uint8).max() > 1:
            raise CheckpointError(
                f"{path}: {short(name)} must hold booleans, but has a byte of {tensor.view(torch.uint8).max()}"
            )
    return tensors


def open_tensors(path: Path, expected: Seal | None = None, *, mapped: bool = False) -> FileReader:
    """A reader of one safetensors file, whose whole header is checked against the size of the file, and the contents
    first against what is `expected`, in the pages that `mapped` weights then lie in: they are found once."""
    file, size = open_file(path)
    try:
        pages = map_file(file) if mapped and size else None
        if expected is not None:
            check_open(path, file, expected, pages)
            file.seek(0)
        maps = {} if pages is None else {file: pages}
        return FileReader(_extents(path, file, size), [file], mapped=mapped, maps=maps)
    except BaseException:
        file.close()
        raise


def open_shards(folder: Path, *, mapped: bool = False) -> FileReader:
    """A reader of a folder's model.safetensors, or of the files that its model.safetensors.index.json names.

    Raises:
        CheckpointError: a file is missing, truncated or not described by its header; the index names a file outside of
            the folder, or a weight that is not where it says; a weight is in a file but not in the index.
    """
    if not (folder / INDEX).exists():
        return open_tensors(folder / WEIGHTS, mapped=mapped)
    index = read_json(folder / INDEX)
    places = index.get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
        raise CheckpointError(f"{folder / INDEX}: weight_map must map weights to files, but got {short(places)}")
    shards = sorted(set(places.values()))
    for shard in shards:
        check_inside(folder / INDEX, shard, ".safetensors")
    extents: dict[str, Extent] = {}
    files: list[FileIO] = []
    try:
        for shard in shards:
            file, size = open_file(folder / shard)
            files.append(file)
            found = _extents(folder / shard, file, size)
            for name in found:
                if places.get(name) != shard:
                    raise CheckpointError(f"{folder / INDEX} must say where {short(name)} of {shard} is, but says "
                                          f"{short(places.get(name))}")  # fmt: skip
            extents |= found
        absent = [name for name in places if name not in extents]
        if absent:
            raise CheckpointError(f"{folder / places[absent[0]]} must hold {short(absent[0])}, but does not")
    except BaseException:
        for file in files:
            file.close()
        raise
    return FileReader(extents, files, mapped=mapped)


def check_inside(index: Path, name: str, suffix: str) -> None:
    """Raises unless an index names a plain file of its own folder."""
    if not name.endswith(suffix) or set(name) & set("/\\:\0"):
        raise CheckpointError(f"{index} must name {suffix} files of its own folder, but got {short(name)}")


def _extents(path: Path, file: FileIO, size: int) -> dict[str, Extent]:
    if size < 8:
        raise CheckpointError(f"{path} must begin with the 8-byte size of its header, but has {size} bytes")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, LARGEST_JSON):
        raise CheckpointError(f"{path} must hold a header of {length} bytes, but has {size} bytes")
    header = parse_json(file.read(length), f"{path}: its header")
    header.pop("__metadata__", None)
    entries = [_entry(path, name, entry) for name, entry in header.items()]
    check_extents(str(path), [(entry.begin, entry.end, entry.name) for entry in entries], size - 8 - length)
    return {entry.name: Extent(file, 8 + length + entry.begin, entry.dtype, tuple(entry.shape)) for entry in entries}


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int


def _entry(path: Path, name: str, entry: Any) -> _Entry:
    where = f"{path}: {short(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets, but got {short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{where} must have one of the dtypes {', '.join(_DTYPES)}, but got {short(dtype)}")
    if not _naturals(shape) or len(shape) > 64 or math.prod(n for n in shape if n) >= 2**63:
        raise CheckpointError(f"{where} must have a shape of sizes that memory can hold, but got {short(shape)}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} must have data_offsets [begin, end], but got {short(offsets)}")
    nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where} of {dtype} and shape {short(shape)} must have {nbytes} bytes, but has offsets {short(offsets)}"
        )
    return _Entry(name, _DTYPES[dtype], shape, *offsets)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
