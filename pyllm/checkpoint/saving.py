"""Checkpoints for others: Hugging Face folders."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyllm.checkpoint.files import seal, short, write_json
from pyllm.checkpoint.folder import sync
from pyllm.checkpoint.safetensors import INDEX, WEIGHTS, write_tensors
from pyllm.families import FAMILIES, Family, export_weights
from pyllm.models import Model
from pyllm.text import Tokenizer

_SHARD = 5 << 30  # bytes


def export(model: Model, path: str | os.PathLike, tokenizer: Tokenizer | None = None) -> None:
    """Writes a Hugging Face folder, which `transformers` and `load` read.

    It holds config.json, safetensors in shards of 5 GiB and, if given one, the tokenizer; all of it or, if
    interrupted, nothing is there.

    Raises:
        FileExistsError: something is there already.
        ValueError: no Hugging Face config says what this model is; the error names a setting that stands in the way.
        OSError: the disk is full, or the like.
    """
    path = Path(path)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise FileExistsError(f"{path} must be a new or an empty folder, but something is there")
    family, config = _described(model)
    config |= {"torch_dtype": str(next(model.parameters()).dtype).removeprefix("torch.")}
    ids = {} if tokenizer is None else _special_ids(tokenizer)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".partial-{path.name}-", dir=path.parent))
    try:
        writing = partial / "folder"  # made apart, with the rights that new folders have
        writing.mkdir()
        _write_weights(writing, export_weights(model, family))
        if tokenizer is not None:
            tokenizer.save(writing)
            write_json(writing / "generation_config.json", ids)
        write_json(writing / "config.json", config | ids)
        for file in writing.iterdir():
            seal(file)
        sync(writing)
        writing.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _described(model: Model) -> tuple[Family, dict[str, Any]]:
    """The family that a model was loaded as, or the first whose config says all of it; and that config."""
    reasons = []
    named = FAMILIES.get(model.family) if model.family is not None else None
    for family in [named] if named is not None else FAMILIES.values():
        if type(model) is not family.model:
            continue
        try:
            config = {"model_type": family.model_type, "architectures": list(family.architectures[:1])}
            config |= family.to_config(model)
            with torch.device("meta"):
                made = _settings(family.model(**family.config(config)))
        except (KeyError, TypeError, ValueError) as e:
            reasons.append(f"{family.model_type}: {e}")
            continue
        ours = _settings(model)
        wrong = [f"{key} {short(ours[key])}" for key in ours if ours[key] != made.get(key)]
        if not wrong:
            return family, config
        reasons.append(f"{family.model_type} has no {', '.join(wrong)}")
    why = "; ".join(reasons) or f"no family is made of {type(model).__name__}"
    raise ValueError(f"[export] the model must be one that a Hugging Face config describes, but {why}. "
                     "pyllm.save keeps any model")  # fmt: skip


def _settings(model: Model) -> dict[str, Any]:
    """A model's config, with defaults that follow from other settings filled in, without what only training needs."""
    settings = {key: value for key, value in model.config.items() if not key.endswith("dropout")}
    if settings.get("num_heads"):
        settings["num_kv_heads"] = settings.get("num_kv_heads") or settings["num_heads"]
        settings["head_dim"] = settings.get("head_dim") or settings["hidden_size"] // settings["num_heads"]
    return settings


def _write_weights(folder: Path, weights: Iterator[tuple[str, Tensor]]) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in weights:
        if shards[-1] and size + tensor.nbytes > _SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if len(shards) == 1:
        write_tensors(folder / WEIGHTS, shards[0])
        return
    places: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard)
        places |= dict.fromkeys(shard, file)
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    eos = _one(tokenizer.eos_ids)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": eos}
    return {key: value for key, value in ids.items() if value is not None}


def _one(ids: Iterable[int]) -> int | list[int] | None:
    ids = list(ids)
    return ids if len(ids) > 1 else ids[0] if ids else None
