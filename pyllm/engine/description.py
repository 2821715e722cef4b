"""What a checkpoint is, and what it takes to load it: measured, in a process of its own."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from pyllm.checkpoint.files import CheckpointError
from pyllm.checkpoint.folder import is_ours, newest
from pyllm.checkpoint.gguf import open_gguf
from pyllm.checkpoint.hub import download
from pyllm.checkpoint.loading import load
from pyllm.checkpoint.saving import export
from pyllm.engine.decoding import why_unrecorded
from pyllm.models import Decoder

_ERRORS = {kind.__name__: kind for kind in (FileNotFoundError, ImportError, OSError)}


def describe(path: str | os.PathLike) -> dict[str, Any]:
    """What `load` makes of a checkpoint of any kind, and the memory that it takes.

    The checkpoint is loaded in a process of its own, on Linux, whose peak of resident memory is compared with what it
    had before; weights are copied, not mapped, so that all that is held counts.

    Returns:
        family: Hugging Face's name of it, if it has one; model: the class; config: the arguments that it is made from.
        unrecorded: what keeps a step of generating from being recorded; None if nothing does, or it does not generate.
        parameters; dtypes: the weights of each, quantised ones by their formats ("int4-min"); context: its length.
        stored: the tensors of each kind in a GGUF file.
        tokenizer: None, or its kind, vocabulary, bos, eos, add_bos and chat_template (whether there is one).
        disk: the bytes of the weights' files; memory: those of the weights when loaded, which are more where packed
        ones were widened; peak: those held at the most while the checkpoint, tokenizer and all, was loaded.

    Raises:
        What `load` raises.
    """
    where = Path(path)
    if not where.exists():
        where = download(path)
    command = [sys.executable, "-c", "from pyllm.engine.description import main; main()", str(where)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        last = " ".join(done.stderr.split())[-300:]
        raise CheckpointError(f"{where}: loading it ended with {done.returncode}: {last}")
    found = json.loads(done.stdout.splitlines()[-1])
    if "error" in found:
        raise _ERRORS.get(found["kind"], CheckpointError)(found["error"])
    return found


def main() -> None:
    """Prints the description of the checkpoint that the command line names, as JSON."""
    path = Path(sys.argv[1])
    try:
        found = _measured(path)
    except (ValueError, OSError, ImportError) as e:
        found = {"error": str(e), "kind": type(e).__name__}
    print(json.dumps(found))


def _measured(path: Path) -> dict[str, Any]:
    _rehearse()
    gc.collect()
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the peak so far
    before = _resident("RssAnon")
    model, tokenizer = load(path, mapped=False)
    # Pages of libraries, which come and go as the system likes, are not counted.
    peak = max(_resident("VmHWM") - _resident("RssFile"), _resident("RssAnon")) - before
    dtypes: Counter[str] = Counter()
    for parameter in model.parameters():
        dtypes[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    for weight in model.quantized_weights():
        dtypes[weight.format] += math.prod(weight.shape)
    found = {"family": model.family, "model": type(model).__name__, "config": model.config, "dtypes": dict(dtypes),
             "parameters": model.num_parameters(), "context": model.context_length, "tokenizer": None, "stored": None,
             "unrecorded": why_unrecorded(model) if model.causal else None,
             "memory": model.num_bytes(), "peak": peak,
             "disk": sum(file.stat().st_size for file in _files(path))}  # fmt: skip
    if tokenizer is not None:
        ends = [tokenizer.token(id) for id in tokenizer.eos_ids]
        bos = None if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
        found["tokenizer"] = {"kind": repr(tokenizer).partition("(")[2].partition(",")[0], "vocabulary": len(tokenizer),
                              "bos": bos, "eos": ends, "add_bos": tokenizer.add_bos,
                              "chat_template": tokenizer.chat_template is not None}  # fmt: skip
    if path.is_file() and path.open("rb").read(4) == b"GGUF":
        with open_gguf(path) as reader:
            found["stored"] = dict(reader.kinds)
    return found


def _rehearse() -> None:
    """Loads a tiny checkpoint, and with it the code that loading needs: its memory is not the checkpoint's."""
    with contextlib.suppress(ImportError):
        importlib.import_module("gguf")
    with tempfile.TemporaryDirectory() as folder:
        export(Decoder(8, 8, 1, 1), folder, verify=False)
        load(folder, mapped=False)


def _files(path: Path) -> list[Path]:
    """The files that the weights are read from."""
    if path.is_file():
        return [path]
    if is_ours(path):
        return [newest(path) / "model.safetensors"]
    return list(path.glob("*.safetensors")) or list(path.glob("pytorch_model*.bin"))


def _resident(what: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{what}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status must have {what}, but has not")
