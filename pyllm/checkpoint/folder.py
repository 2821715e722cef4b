"""Checkpoints of our own make.

A folder of checkpoints holds numbered folders, checkpoint-000001 and so on; the one with the highest number is the
checkpoint, and is never changed. Saving writes a folder beside it under another name, gets it onto the disk, and
renames it to the next number: at that one rename the new checkpoint takes the place of the old, which is then removed.
Whatever stops a writer, one or the other is there and whole; the next writer clears away what was left half-done.

    config.json             what kind of model, its settings, and size and SHA-256 or checksum of the other files
    model.safetensors       weights; those that share memory once
    tokenizer.json          if there is a tokenizer, or Marian's files in its place; with tokenizer_config.json and
                            generation_config.json, which hold its control tokens and chat template
    training.json           if training can go on from here: plain values, and names of tensors in
    optimizer.safetensors   the tensors of the optimizer and of random generators
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pyllm.checkpoint.files import (
    DIGESTS,
    CheckpointError,
    Seal,
    check_contents,
    check_plain,
    check_size,
    read_json,
    seal,
    write_json,
)
from pyllm.checkpoint.safetensors import check_tensors, read_tensors, write_tensors
from pyllm.checkpoint.state import pack, unpack
from pyllm.text import Tokenizer
from pyllm.text.formats import MARIAN

_FORMAT, _VERSION = "pyllm", 1
_MODEL, _TOKENIZER, _TRAINING, _OPTIMIZER = (
    "model.safetensors",
    "tokenizer.json",
    "training.json",
    "optimizer.safetensors",
)
_MORE_OF_TOKENIZER = {"tokenizer_config.json", "generation_config.json"}  # older checkpoints lack them
_PARTIAL = ".partial-"


@dataclass
class Checkpoint:
    """What a checkpoint holds. Weights that shared memory do so again. `folder` is where it was read from."""

    model_type: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    tokenizer: Tokenizer | None
    training: dict[str, Any] | None
    folder: Path


def save_checkpoint(folder: str | os.PathLike, *, model_type: str, config: dict[str, Any], weights: dict[str, Tensor],
                    tokenizer: Tokenizer | None = None, training: dict[str, Any] | None = None) -> Path:  # fmt: skip
    """Makes this the checkpoint of a folder, in the place of the one that is there: whole or, if interrupted, not.

    One process at a time may write to a folder; any number may read.

    Args:
        folder: made if it does not exist.
        model_type, config: what the model is made from: plain values, with finite numbers. Tuples come back as lists.
        weights: the model's state_dict. Any device; they come back on the CPU.
        tokenizer: the model's.
        training: what is needed to go on: dicts, lists and tuples (which come back as lists) of plain values and of
            tensors, such as `optimizer_tensors` and `random_state` give; all of them come back exactly.

    Returns:
        The folder of the new checkpoint.

    Raises:
        TypeError, ValueError: something that cannot be kept exactly; the old checkpoint stays.
        FileExistsError: the folder holds a config.json: it is a checkpoint, not a folder of them.
        OSError: the disk is full, or the like; the old checkpoint stays.
    """
    folder = Path(folder)
    plain, optimizer = check_savable(folder, model_type=model_type, config=config, weights=weights, training=training)
    kept, tied = _tied(weights)
    folder.mkdir(parents=True, exist_ok=True)
    for partial in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(partial, ignore_errors=True)
    writing = Path(tempfile.mkdtemp(prefix=_PARTIAL, dir=folder))
    try:
        write_tensors(writing / _MODEL, kept)
        if tokenizer is not None:
            write_tokenizer(writing, tokenizer)
        if plain is not None:
            write_json(writing / _TRAINING, plain, indent=None)
            write_tensors(writing / _OPTIMIZER, optimizer)
        files = {path.name: seal(path).entry() for path in sorted(writing.iterdir())}
        write_json(writing / "config.json", {"format": _FORMAT, "version": _VERSION, "model_type": model_type,
                                             "config": config, "tied": tied, "files": files})  # fmt: skip
        seal(writing / "config.json")
        writing.chmod(folder.stat().st_mode & 0o777)
        sync(writing)
        older = _numbered(folder)
        new = folder / f"checkpoint-{max(older, default=0) + 1:06d}"
        writing.rename(new)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    sync(folder)
    for old in older.values():
        with contextlib.suppress(OSError):
            # Renamed first, so that a number never stands on half a checkpoint.
            shutil.rmtree(old.rename(folder / f"{_PARTIAL}{old.name}"))
    return new


def check_savable(folder: Path, *, model_type: str, config: dict[str, Any], weights: dict[str, Tensor],
                  training: dict[str, Any] | None = None) -> tuple[Any, dict[str, Tensor]]:  # fmt: skip
    """What is plain in `training`, and its tensors.

    Raises:
        TypeError, ValueError, FileExistsError: what `save_checkpoint` raises of these, before anything is written.
    """
    _check_type("model_type", model_type, str)
    _check_type("config", config, dict)
    if training is not None:
        _check_type("training", training, dict)
    check_plain(config, "config")
    check_tensors(weights, "weights")
    tensors: dict[str, Tensor] = {}
    plain = None if training is None else pack(training, "training", tensors)
    check_tensors(tensors, "training")
    if (folder / "config.json").exists():
        raise FileExistsError(f"{folder} must be a folder for checkpoints, but is one itself: it has a config.json")
    return plain, tensors


def load_checkpoint(folder: str | os.PathLike, *, training: bool = True, tokenizer: bool = True,
                    mapped: bool = False) -> Checkpoint:  # fmt: skip
    """Reads the checkpoint of a folder: one that `save_checkpoint` was given, or returned.

    Everything is checked, sizes before contents and contents before they are used: what comes back is what was saved.

    Args:
        training: if False, what only training needs is neither read nor checked, and comes back as None.
        tokenizer: the same, of the tokenizer.
        mapped: weights lie in the pages of their file, which is never changed; what is written to them stays apart.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such folder.
        CheckpointError: there is no checkpoint in it, or a file is missing, truncated, damaged or not of this format.
    """
    folder = Path(folder)
    while True:
        current = newest(folder)
        try:
            return _read(current, training, tokenizer, mapped)
        except RecursionError:
            raise CheckpointError(f"{current} must hold JSON that is not nested so deeply") from None
        except (CheckpointError, FileNotFoundError):
            # A writer may have put a new checkpoint in the place of the one that was being read.
            if current.exists() or newest(folder) == current:
                raise


def is_ours(folder: Path) -> bool:
    """Whether a folder is to be read by `load_checkpoint`."""
    config = folder / "config.json"
    return not config.exists() or "format" in read_json(config)


def _check_type(name: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be a {kind.__name__}, but got {type(value).__name__}")


def _read(folder: Path, with_training: bool, with_tokenizer: bool, mapped: bool) -> Checkpoint:
    where = folder / "config.json"
    contents = read_json(where)
    if contents.get("format") != _FORMAT or contents.get("version") != _VERSION:
        raise CheckpointError(f"{where} must be of format {_FORMAT!r}, version {_VERSION}, but is of format "
                              f"{contents.get('format')!r}, version {contents.get('version')!r}")  # fmt: skip
    for key, kind in (("model_type", str), ("config", dict), ("tied", dict), ("files", dict)):
        if not isinstance(contents.get(key), kind):
            raise CheckpointError(f"{where}: {key} must be a {kind.__name__}, but got {contents.get(key)!r}")
    try:
        check_plain(contents["config"], "config")
    except ValueError as e:
        raise CheckpointError(f"{where}: {e}") from None
    files = _seals(where, contents["files"])
    training_files = {_TRAINING, _OPTIMIZER} & files.keys()
    unread = set() if with_training else training_files
    if not with_tokenizer:
        unread |= files.keys() - training_files - {_MODEL}
    files = {name: expected for name, expected in files.items() if name not in unread}
    for name, expected in files.items():
        check_size(folder / name, expected)
    for name, expected in files.items():
        if name != _MODEL:
            check_contents(folder / name, expected)
    weights = read_tensors(folder / _MODEL, files[_MODEL], mapped=mapped)

    tokenizer = _read_tokenizer(folder, files) if files.keys() & {_TOKENIZER, MARIAN[0]} else None
    training = None
    if _TRAINING in files:
        training = unpack(read_json(folder / _TRAINING), read_tensors(folder / _OPTIMIZER))
    for name, same in contents["tied"].items():
        if name in weights or not isinstance(same, str) or same not in weights:
            raise CheckpointError(f"{where}: tied must name weights of {_MODEL}, but got {name!r}: {same!r}")
    weights |= {name: weights[same] for name, same in contents["tied"].items()}
    return Checkpoint(contents["model_type"], contents["config"], weights, tokenizer, training, folder)


def _read_tokenizer(folder: Path, files: dict[str, Seal]) -> Tokenizer:
    more = files.keys() & _MORE_OF_TOKENIZER
    try:
        tokenizer = Tokenizer.load(folder if more else folder / _TOKENIZER)
    except (ValueError, IsADirectoryError) as e:
        raise CheckpointError(str(e)) from None
    for name in more:  # which are left out, and not missed, once a newer checkpoint has taken the place of this one
        check_size(folder / name, files[name])
    return tokenizer


def _seals(where: Path, files: dict) -> dict[str, Seal]:
    sets = [{_MODEL}, {_MODEL, _TOKENIZER}, {_MODEL, _TOKENIZER, *_MORE_OF_TOKENIZER},
            {_MODEL, *MARIAN, *_MORE_OF_TOKENIZER}]  # fmt: skip
    if files.keys() not in [*sets, *({*names, _TRAINING, _OPTIMIZER} for names in sets)]:
        raise CheckpointError(f"{where}: files must name those of a checkpoint, but got {', '.join(files)}")
    seals = {}
    for name, expected in files.items():
        size, kind, digest = _entry(expected)
        if type(size) is not int or kind not in DIGESTS or not isinstance(digest, str):
            raise CheckpointError(f"{where}: files: {name} must have bytes and {' or '.join(DIGESTS)}, "
                                  f"but got {expected!r}")  # fmt: skip
        seals[name] = Seal(size, kind, digest)
    return seals


def _entry(expected: Any) -> tuple[Any, Any, Any]:
    """The size, and kind and value of the digest, of a file's entry; None for what is wrong."""
    if not isinstance(expected, dict) or len(expected) != 2:
        return None, None, None
    kind = next((key for key in expected if key != "bytes"), None)
    return expected.get("bytes"), kind, expected.get(kind)


def newest(folder: Path) -> Path:
    """The folder of the checkpoint of a folder: itself, or the newest inside."""
    if (folder / "config.json").exists():
        return folder
    numbered = _numbered(folder)
    if not numbered:
        raise CheckpointError(f"{folder} must hold a checkpoint: a config.json or folders such as checkpoint-000001")
    return numbered[max(numbered)]


def _numbered(folder: Path) -> dict[int, Path]:
    found = ((re.fullmatch(r"checkpoint-([0-9]+)", path.name), path) for path in folder.iterdir())
    return {int(match[1]): path for match, path in found if match}


def _tied(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Splits weights into those to write, and {name: the one written} for the same memory seen in the same way."""
    kept: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name, tensor in weights.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            kept[name] = tensor
    return kept, tied


def write_tokenizer(folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Writes all of a tokenizer into a folder; returns the ids that a Hugging Face folder's config.json repeats."""
    tokenizer.save(folder)
    ends = list(tokenizer.eos_ids)
    ids: dict[str, Any] = {} if tokenizer.bos_id is None else {"bos_token_id": tokenizer.bos_id}
    if ends:
        ids["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    write_json(folder / "generation_config.json", ids)
    return ids


def sync(folder: Path) -> None:
    """Sees to it that a folder's list of files is on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
