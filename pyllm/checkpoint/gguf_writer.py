"""Writes GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md) through the package `gguf`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyllm.checkpoint.architectures import SLOWING, TENSORS, Architecture
from pyllm.checkpoint.reader import neighbours
from pyllm.families import export_weights
from pyllm.models import Model

_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_FILE_TYPES = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
_ALWAYS_FLOAT32 = ("ffn_gate_inp.weight", "position_embd.weight")  # and whatever is no matrix


def write_gguf(path: Path, model: Model, table: Architecture, config: dict[str, Any], more: dict[str, Any],
               dtype: torch.dtype, progress: Callable[[int, int], None] | None = None) -> None:  # fmt: skip
    """Writes a model's weights and metadata.

    Args:
        config: `table.to_config(model)`.
        more: further metadata, with whole keys.
        dtype: of the matrices.

    Raises:
        ImportError: the package `gguf` is not there.
        ValueError: a dtype that cannot be written.
    """
    try:
        import gguf
    except ImportError:
        raise ImportError("[export] to write GGUF files needs the package gguf: pip install pyllm[gguf]") from None
    if dtype not in _KINDS:
        raise ValueError(f"[export] dtype must be one of {', '.join(map(str, _KINDS))} for GGUF, but got {dtype}")
    writer = gguf.GGUFWriter(path, table.model_type)
    try:
        writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[dtype]])
        own = {key: value for key, value in config.items() if key not in (TENSORS, SLOWING)}
        for key, value in ({f"{table.model_type}.{key}": value for key, value in own.items()} | more).items():
            _add[type(value)](writer, key, value)
        pieces = _pieces(model, table)
        if SLOWING in config:
            pieces[SLOWING] = [config[SLOWING]]
        kinds = {name: torch.float32 if parts[0].dim() < 2 or name.endswith(_ALWAYS_FLOAT32) else dtype
                 for name, parts in pieces.items()}  # fmt: skip
        for name, parts in pieces.items():
            shape = parts[0].shape if name in config[TENSORS] or name == SLOWING else (len(parts), *parts[0].shape)
            kind = gguf.GGMLQuantizationType[_KINDS[kinds[name]]]
            size = sum(part.numel() for part in parts) * kinds[name].itemsize
            writer.add_tensor_info(name, shape, np.dtype(np.int32), size, kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done, total = 0, sum(part.numel() for parts in pieces.values() for part in parts)
        for name, parts in pieces.items():
            change = _change(name, table, config)
            changed = torch.cat([change(part).to("cpu", kinds[name]).reshape(-1) for part in parts])
            writer.write_tensor_data(changed.view(torch.uint8).numpy())
            done += changed.numel()
            if progress is not None:
                progress(done, total)
    finally:
        writer.close()


def _pieces(model: Model, table: Architecture) -> dict[str, list[Tensor]]:
    """What each tensor of the file is made of: a weight or, of a mixture, those of all experts."""
    pieces: dict[str, list[Tensor]] = {}
    for name, tensor in export_weights(model, table):
        expert = re.fullmatch(r"(blk\.[0-9]+\.ffn_\w+)\.[0-9]+\.weight", name)
        pieces.setdefault(f"{expert[1]}_exps.weight" if expert else name, []).append(tensor)
    return pieces


def _change(name: str, table: Architecture, config: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """The reverse of what the reader does to a tensor."""
    if table.one_plus and name.endswith("norm.weight"):
        return lambda weight: weight.float() + 1
    rotated = re.fullmatch(r"blk\.[0-9]+\.attn_([qk])\.(?:weight|bias)", name)
    if not table.rotary_pairs or not rotated:
        return lambda weight: weight
    heads = config["attention.head_count" if rotated[1] == "q" else "attention.head_count_kv"]
    return functools.partial(neighbours, heads=heads)


_add: dict[type, Callable] = {
    int: lambda writer, key, value: writer.add_uint32(key, value),
    float: lambda writer, key, value: writer.add_float32(key, value),
    bool: lambda writer, key, value: writer.add_bool(key, value),
    str: lambda writer, key, value: writer.add_string(key, value),
    bytes: lambda writer, key, value: writer.add_array(key, value),
    list: lambda writer, key, value: writer.add_array(key, value),
}
