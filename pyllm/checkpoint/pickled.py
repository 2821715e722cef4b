"""Pickled weights, pytorch_model.bin in one file or in shards, through torch's reader that makes nothing but tensors.

They are read whole: until the model is filled, there is memory for both.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from pyllm.checkpoint.files import CheckpointError, read_json, short
from pyllm.checkpoint.reader import MemoryReader
from pyllm.checkpoint.safetensors import check_inside

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
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch's errors have no type in common
        raise CheckpointError(f"{path} must hold pickled tensors and nothing else, but torch's reader refuses "
                              f"it: {type(e).__name__}") from e  # fmt: skip
    if not isinstance(found, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.layout == torch.strided
        for name, tensor in found.items()
    ):
        raise CheckpointError(f"{path} must hold named tensors, but holds {type(found).__name__}")
    return found
