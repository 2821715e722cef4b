"""Checkpoints from the Hugging Face hub, through its own package: huggingface_hub."""

from __future__ import annotations

import os
import re
from pathlib import Path

_NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_FILES = ["*.json", "*.txt", "*.jinja", "*.model", "*.spm", "vocab.bpe"]
_WEIGHTS = ["model.safetensors", "model-*.safetensors"], ["pytorch_model.bin", "pytorch_model-*.bin"]


def download(name: str | os.PathLike) -> Path:
    """The folder that holds a hub's checkpoint. What was had before is not had again.

    Raises:
        FileNotFoundError: it is no name on the hub, or cannot be had: without huggingface_hub, offline, not allowed.
    """
    name = os.fspath(name)
    if not re.fullmatch(_NAME, name) or name.endswith((".gguf", ".bin")):
        raise FileNotFoundError(f"{name} must be a file, a folder, or owner/name on the Hugging Face hub, but is none")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(f"{name} is no file or folder here, and to have it from the Hugging Face hub needs the "
                                "package huggingface_hub: pip install pyllm[hub]") from None  # fmt: skip
    try:
        for weights in _WEIGHTS:
            folder = Path(snapshot_download(name, allow_patterns=[*_FILES, *weights]))
            if any(folder.glob(weights[0])) or any(folder.glob(weights[1])):
                break
    except Exception as e:  # its errors have no type in common
        reason = " ".join(str(e).split())[:300]
        raise FileNotFoundError(f"{name} is no file or folder here, and cannot be had from the Hugging Face hub: "
                                f"{type(e).__name__}: {reason}") from e  # fmt: skip
    return folder
