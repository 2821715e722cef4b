"""The files of a checkpoint: JSON and safetensors, read with distrust."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

_MIB = 1 << 20
_LARGEST_JSON = 64 * _MIB
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged or of another make. Its one line names the file, and what is wrong."""


class Seal(NamedTuple):
    """What a file must be."""

    bytes: int
    sha256: str


def seal(path: Path) -> Seal:
    """Sees to it that a file is on the disk, and says what it is."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return Seal(os.fstat(file.fileno()).st_size, _digest(file))


def check_size(path: Path, expected: Seal) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing from its checkpoint") from None
    if size != expected.bytes:
        raise CheckpointError(f"{path} must have {expected.bytes} bytes, but has {size}")


def check_contents(path: Path, expected: Seal) -> None:
    with open(path, "rb") as file:
        digest = _digest(file)
    if digest != expected.sha256:
        raise CheckpointError(f"{path} is damaged: its SHA-256 must be {expected.sha256}, but is {digest}")


def write_json(path: Path, tree: dict, indent: int | None = 1) -> None:
    path.write_text(json.dumps(tree, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict:
    """The object in a JSON file.

    Raises:
        CheckpointError: the file is missing, too large, no JSON, or holds a key twice or no object.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing from its checkpoint") from None
    if size > _LARGEST_JSON:
        raise CheckpointError(f"{path} must have at most {_LARGEST_JSON} bytes, but has {size}")
    return _parse(path.read_bytes(), str(path))


def check_plain(tree: Any, where: str) -> None:
    """Raises unless a tree is of dicts, lists, strings, booleans, None, finite floats and 64-bit integers."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if not isinstance(key, str):
                raise TypeError(f"{where} must have keys that are strings, but got {key!r}")
            check_plain(value, f"{where}.{key}")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            check_plain(value, f"{where}[{i}]")
    elif isinstance(tree, float):
        if not math.isfinite(tree):
            raise ValueError(f"{where} must be finite, but got {tree}")
    elif isinstance(tree, int):
        if not -(2**63) <= tree < 2**63:
            raise ValueError(f"{where} must be a 64-bit integer, but got one of {tree.bit_length()} bits")
    elif not isinstance(tree, str | None):
        raise TypeError(f"{where} must be what JSON can hold, but got {type(tree).__name__}")


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
    """Writes a safetensors file. Tensors that share memory are written each on its own."""
    own, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        own[name] = tensor
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(own, path)
    path.chmod(mode)  # the library lets only the owner read


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file (https://github.com/huggingface/safetensors), in memory of their own.

    The whole header is checked against the size of the file before memory is taken; the file is not mapped, so that
    nothing which happens to it later can harm.

    Raises:
        CheckpointError: the file is truncated, or its header does not describe it.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise CheckpointError(f"{path} must begin with the 8-byte size of its header, but has {size} bytes")
        (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _LARGEST_JSON):
            raise CheckpointError(f"{path} must hold a header of {length} bytes, but has {size} bytes")
        header = _parse(file.read(length), f"{path}: its header")
        header.pop("__metadata__", None)
        entries = sorted((_entry(path, name, entry) for name, entry in header.items()), key=lambda e: (e.begin, e.end))
        end = 0
        for entry in entries:
            if entry.begin != end:
                raise CheckpointError(
                    f"{path}: {_short(entry.name)} must begin at byte {end}, but does at {entry.begin}"
                )
            end = entry.end
        if end != size - 8 - length:
            raise CheckpointError(f"{path} must have {end} bytes behind its header, but has {size - 8 - length}")
        tensors = {}
        for entry in entries:
            data = torch.empty(entry.end - entry.begin, dtype=torch.uint8)
            read = file.readinto(data.numpy().data)
            if read != len(data):
                raise CheckpointError(
                    f"{path}: {_short(entry.name)} must have {len(data)} bytes, but {read} could be read"
                )
            if entry.dtype == torch.bool and len(data) and data.max() > 1:
                raise CheckpointError(
                    f"{path}: {_short(entry.name)} must hold booleans, but has a byte of {data.max()}"
                )
            tensors[entry.name] = data.view(entry.dtype).view(entry.shape)
    return tensors


class _Entry(NamedTuple):
    name: str
    dtype: torch.dtype
    shape: list[int]
    begin: int
    end: int


def _entry(path: Path, name: str, entry: Any) -> _Entry:
    where = f"{path}: {_short(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets, but got {_short(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise CheckpointError(f"{where} must have one of the dtypes {', '.join(_DTYPES)}, but got {_short(dtype)}")
    if not _naturals(shape) or len(shape) > 64 or math.prod(n for n in shape if n) >= 2**63:
        raise CheckpointError(f"{where} must have a shape of sizes that memory can hold, but got {_short(shape)}")
    if not _naturals(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} must have data_offsets [begin, end], but got {_short(offsets)}")
    nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise CheckpointError(
            f"{where} of {dtype} and shape {_short(shape)} must have {nbytes} bytes, but has offsets {_short(offsets)}"
        )
    return _Entry(name, _DTYPES[dtype], shape, *offsets)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _parse(data: bytes, where: str) -> dict:
    def object_of(pairs):
        tree = dict(pairs)
        if len(tree) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise CheckpointError(f"{where} must have each name once, but has {_short(twice)} twice")
        return tree

    try:
        tree = json.loads(data.decode("utf-8"), object_pairs_hook=object_of)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{where} must be JSON, but: {e}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{where} must be a JSON object, but is {_short(tree)}")
    return tree


def _digest(file) -> str:
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_MIB))
    while n := file.readinto(chunk):
        digest.update(chunk[:n])
    return digest.hexdigest()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
