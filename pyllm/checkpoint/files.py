"""The files of a checkpoint: their seals, and their JSON, read with distrust."""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections import Counter
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pyllm import _C

_MIB = 1 << 20
LARGEST_JSON = 64 * _MIB


class CheckpointError(ValueError):
    """A checkpoint that is incomplete, damaged or of another make. Its one line names the file, and what is wrong."""


class Seal(NamedTuple):
    """What a file must be: its size and, by its name, a digest of its contents: "sha256" or, as fast as memory is read,
    "checksum", the SHA-256 of the sums that `_C.checksum` makes."""

    bytes: int
    kind: str
    digest: str

    def entry(self) -> dict[str, Any]:
        """As a checkpoint's config.json has it."""
        return {"bytes": self.bytes, self.kind: self.digest}


DIGESTS = {"sha256": "SHA-256", "checksum": "checksum"}


def seal(path: Path) -> Seal:
    """Sees to it that a file is on the disk, and says what it is."""
    kind = "checksum" if path.suffix == ".safetensors" else "sha256"
    with open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        return Seal(os.fstat(file.fileno()).st_size, kind, _digest(file, kind))


def check_size(path: Path, expected: Seal) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing from its checkpoint") from None
    if size != expected.bytes:
        raise CheckpointError(f"{path} must have {expected.bytes} bytes, but has {size}")


def map_file(file: FileIO) -> mmap.mmap:
    """A file's pages, which the system reads when they are used. What is written to them stays apart."""
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def check_contents(path: Path, expected: Seal) -> None:
    with open(path, "rb", buffering=0) as file:
        check_open(path, file, expected)


def check_open(path: Path, file: FileIO, expected: Seal, pages: mmap.mmap | None = None) -> None:
    """`pages` are those of the whole file, if it is mapped already."""
    digest = _digest(file, expected.kind, pages)
    if digest != expected.digest:
        what = DIGESTS[expected.kind]
        raise CheckpointError(f"{path} is damaged: its {what} must be {expected.digest}, but is {digest}")


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
    if size > LARGEST_JSON:
        raise CheckpointError(f"{path} must have at most {LARGEST_JSON} bytes, but has {size}")
    return parse_json(path.read_bytes(), str(path))


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


def parse_json(data: bytes, where: str) -> dict:
    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        tree = dict(pairs)
        if len(tree) != len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise CheckpointError(f"{where} must have each name once, but has {short(twice)} twice")
        return tree

    try:
        tree = json.loads(data.decode("utf-8"), object_pairs_hook=object_of)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{where} must be JSON, but: {e}") from None
    if not isinstance(tree, dict):
        raise CheckpointError(f"{where} must be a JSON object, but is {short(tree)}")
    return tree


def _digest(file: FileIO, kind: str, pages: mmap.mmap | None = None) -> str:
    if kind == "checksum":
        if pages is None and os.fstat(file.fileno()).st_size:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as contents:
                return _digest(file, kind, contents)
        size = 0 if pages is None else len(pages)
        sums = torch.empty(-(-size // _MIB), 64, dtype=torch.int32)
        if pages is not None:
            _C.checksum(np.frombuffer(pages, np.uint8), sums)
        return hashlib.sha256(sums.numpy().tobytes()).hexdigest()
    digest, chunk = hashlib.sha256(), memoryview(bytearray(_MIB))
    while n := file.readinto(chunk):
        digest.update(chunk[:n])
    return digest.hexdigest()


def short(value: Any) -> str:
    """A value for an error's one line."""
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
