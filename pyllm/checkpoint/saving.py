"""Checkpoints for others: Hugging Face folders and GGUF files."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyllm.checkpoint.architectures import ARCHITECTURES, Architecture
from pyllm.checkpoint.files import seal, write_json
from pyllm.checkpoint.folder import sync, write_tokenizer
from pyllm.checkpoint.gguf_tokenizer import tokenizer_metadata
from pyllm.checkpoint.gguf_writer import write_gguf
from pyllm.checkpoint.loading import without_memory
from pyllm.checkpoint.safetensors import INDEX, WEIGHTS, write_tensors
from pyllm.checkpoint.verifying import check_same, differences
from pyllm.families import FAMILIES, Family, WeightsError, export_weights
from pyllm.families.settings import generation_settings
from pyllm.models import Model
from pyllm.text import Tokenizer

Progress = Callable[[str, int, int], None]
_SHARD = 5 << 30  # bytes


def export(model: Model, path: str | os.PathLike, tokenizer: Tokenizer | None = None, *, gguf: bool = False,
           dtype: torch.dtype | None = None, verify: bool = True,
           progress: Progress | None = None) -> None:  # fmt: skip
    """Writes a model for others: a Hugging Face folder, which `transformers` and `load` read, or a GGUF file.

    A folder holds config.json, safetensors in shards of 5 GiB and, if given one, the tokenizer. All is written beside,
    read again and compared with the model and the tokenizer (weights, logits, tokens, what the chat template writes),
    then put in its place: all of it or, if interrupted, nothing is there. `model.save(path, ...)` is the same.

    Args:
        path: a new or an empty folder, or a new file.
        gguf: a GGUF file, of the decoders that it has an architecture for. Needs the package `gguf`.
        dtype: of the weights, the model's if None. GGUF keeps those that are no matrices in float32.
        verify: whether what was written is read and compared; that takes memory for a second model.
        progress: called with what is done ("writing", "verifying"), how much of it so far, and how much there is.

    Raises:
        FileExistsError: something is there already.
        ValueError: no Hugging Face config or GGUF architecture says what this model is, or GGUF has no place for the
            tokenizer; the error names a setting that stands in the way.
        CheckpointError: what was written does not come back the same. Nothing is left of it.
        OSError: the disk is full, or the like.
    """
    path = Path(path)
    if path.exists() and (gguf or not (path.is_dir() and not any(path.iterdir()))):
        raise FileExistsError(f"{path} must be a new {'file' if gguf else 'or an empty folder'}, "
                              "but something is there")  # fmt: skip
    dtype = dtype or next(model.parameters()).dtype
    family, config = _described(model, gguf)
    more = tokenizer_metadata(tokenizer, model.vocab_size) if gguf and tokenizer is not None else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".partial-{path.name}-", dir=path.parent))
    try:
        writing = partial / path.name  # made apart, with the rights that new files and folders have
        if isinstance(family, Architecture):
            write_gguf(writing, model, family, config, more, dtype, _stage(progress, "writing"))
            seal(writing)
        else:
            config |= {"torch_dtype": str(dtype).removeprefix("torch.")}
            _write_folder(writing, config, export_weights(model, family), tokenizer, model.unheeded, dtype,
                          _stage(progress, "writing"))  # fmt: skip
        if verify:
            check_same(model, tokenizer, writing, _stage(progress, "verifying"))
        writing.rename(path)
        sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _stage(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else functools.partial(progress, what)


def _described(model: Model, gguf: bool) -> tuple[Family, dict[str, Any]]:
    """The family, or GGUF's architecture, that a model was loaded as, or the first that says all of it; its config."""
    reasons, what = [], "that GGUF has" if gguf else "that a Hugging Face config describes"
    tables: Iterable[Family] = FAMILIES.values()
    if gguf:
        tables = [table for table in ARCHITECTURES.values() if model.family in (None, *table.families)]
    elif model.family in FAMILIES:
        tables = [FAMILIES[model.family]]
    for table in tables:
        if type(model) is not table.model:
            continue
        try:
            named = {"model_type": table.model_type, "architectures": list(table.architectures[:1])}
            config = ({} if gguf else named) | table.to_config(model)
            with without_memory():
                wrong = differences(model, table.model(**table.config(config)))
        except WeightsError:
            raise
        except (KeyError, TypeError, ValueError) as e:
            reasons.append(f"{table.model_type}: {e}")
            continue
        if not wrong:
            return table, config
        reasons.append(f"{table.model_type} has no {', '.join(wrong)}")
    why = "; ".join(reasons) or f"none is made for {model.family or type(model).__name__}"
    raise ValueError(f"[export] the model must be one {what}, but {why}. pyllm.save keeps any model")


def _write_folder(folder: Path, config: dict[str, Any], weights: Iterator[tuple[str, Tensor]],
                  tokenizer: Tokenizer | None, unheeded: Mapping[str, Any], dtype: torch.dtype,
                  progress: Callable[[int, int], None] | None) -> None:  # fmt: skip
    folder.mkdir()
    _write_weights(folder, ((name, tensor.to(dtype)) for name, tensor in weights), progress)
    generation = {} if tokenizer is None else write_tokenizer(folder, tokenizer)
    config |= generation
    if tokenizer is not None or unheeded:  # a file, in which alone transformers then looks for what is to be generated
        if config.get("decoder_start_token_id") is not None:
            generation = {key: value for key, value in generation_settings(config).items() if value is not None}
        write_json(folder / "generation_config.json", {**generation, **unheeded})
    write_json(folder / "config.json", config)
    for file in folder.iterdir():
        seal(file)
    sync(folder)


def _write_weights(folder: Path, weights: Iterator[tuple[str, Tensor]],
                   progress: Callable[[int, int], None] | None) -> None:  # fmt: skip
    shards: list[dict[str, Tensor]] = [{}]
    size = total = 0
    for name, tensor in weights:
        if shards[-1] and size + tensor.nbytes > _SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size, total = size + tensor.nbytes, total + tensor.nbytes
    done = 0
    places: dict[str, str] = {}
    for i, shard in enumerate(shards):
        file = WEIGHTS if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / file, shard)
        places |= dict.fromkeys(shard, file)
        done += sum(tensor.nbytes for tensor in shard.values())
        if progress is not None:
            progress(done, total)
    if len(shards) > 1:
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
