"""Pickled weights, pytorch_model.bin in one file or in shards, through torch's reader that makes nothing but tensors.

They are read whole, and handed over one by one: those that a parameter is joined of are held twice for that time. What
torch's reader would take memory for is looked at first: it does as the file says.
"""

from __future__ import annotations

import pickle
import zipfile
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyllm.checkpoint.files import CheckpointError, read_json, short
from pyllm.checkpoint.reader import MemoryReader
from pyllm.checkpoint.safetensors import check_inside

_ITEMS = {"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8,
          "IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1}  # fmt: skip
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"


def open_pickled(folder: Path) -> MemoryReader:
    """A reader of a folder's pickled weights.

    Raises:
        CheckpointError: a file is missing, damaged, or holds anything but named tensors; the index names a file outside
            of the folder; a weight is in two files.
    """
    shards = [PICKLED]
    if not (folder / PICKLED).exists():
        places = read_json(folder / PICKLED_INDEX).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(place, str) for place in places.values()):
            raise CheckpointError(f"{folder / PICKLED_INDEX}: weight_map must map weights to files, "
                                  f"but got {short(places)}")  # fmt: skip
        shards = sorted(set(places.values()))
    for shard in shards:
        check_inside(folder / PICKLED_INDEX, shard, ".bin")
    tensors: dict[str, Tensor] = {}
    for shard in shards:
        found = _read(folder / shard)
        if twice := tensors.keys() & found.keys():
            raise CheckpointError(f"{folder / shard} must hold each weight once, but has {short(min(twice))} again")
        tensors |= found
    return MemoryReader(tensors)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path} is missing from its checkpoint")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            _check_archive(file, size) if file.read(4) == b"PK\3\4" else _check_old(file, size)
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch's errors have no type in common
        why = str(e) if isinstance(e, CheckpointError) else f"torch's reader refuses it: {type(e).__name__}"
        raise CheckpointError(f"{path} must hold pickled tensors and nothing else, but {why}") from e
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in found.items()
    ):
        raise CheckpointError(f"{path} must hold named tensors, but holds {type(found).__name__}")
    sizes = [tensor.nbytes for tensor in found.values()]
    whole = all(tensor.nbytes <= tensor.untyped_storage().nbytes() for tensor in found.values())
    if not whole or sum(sizes) > 2 * size:  # twice, for an embedding that is also the head
        raise CheckpointError(f"{path} must hold all elements of its tensors, but these repeat some")
    return found


def _check_archive(file: BufferedReader, size: int) -> None:
    """For files since torch 1.6: archives, whose members must be as they are, for torch would unpack them."""
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(m.compress_type != zipfile.ZIP_STORED for m in members) or sum(m.file_size for m in members) > size:
        raise CheckpointError("its members are compressed, or more than the file holds")


def _check_old(file: BufferedReader, size: int) -> None:
    """For older files: five pickles, then the elements, for which torch makes room as the fourth says."""
    file.seek(0)
    reader = _Sizes(_Bounded(file, size))
    for _ in range(5):
        reader.load()
    if sum(reader.storages.values()) > size:
        raise CheckpointError(f"its tensors have {sum(reader.storages.values())} bytes and the file {size}")


class _Bounded:
    """A file that is not asked for more than it has, since room would be made for it first."""

    def __init__(self, file: BufferedReader, size: int):
        self.file, self.size = file, size

    def read(self, count: int) -> bytes:
        return self.file.read(min(count, self.size - self.file.tell()))

    def readline(self) -> bytes:
        return self.file.readline(4096)


class _Anything:
    """Stands for what a pickle names: nothing of it is looked up or called."""

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    __call__ = __setitem__ = __setstate__ = extend = append = __init__


class _Sizes(pickle._Unpickler):  # the one in C makes room for what a file promises
    """Finds the storages of an old file."""

    def __init__(self, file: _Bounded):
        super().__init__(file)
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        return name if module == "torch" and name in _ITEMS else _Anything

    def persistent_load(self, pid: Any) -> Any:
        _, kind, key, _, count, _ = pid
        self.storages[key] = _ITEMS[kind] * count
        return _Anything()
