from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from pydoc_data import topics
from typing import TypeVar

S = TypeVar("S", bound=Sequence)


def embedded_corpus() -> str:
    """Text that every Python carries: its language reference, about 465,000 characters of English.

    All of `pydoc_data.topics` in the order of its keys; it differs a little from one version of Python to the next.
    """
    return "".join(topics.topics[key] for key in sorted(topics.topics))


def read_text(paths: str | os.PathLike | Iterable[str | os.PathLike]) -> str:
    """The text of one or several UTF-8 files, one after the other.

    It is taken as it is, without the byte order mark that may begin a file. A file that does not end in a newline gets
    one before the next file's text.

    Raises:
        FileNotFoundError, IsADirectoryError, PermissionError: a file that cannot be opened.
        ValueError: no files, or a file that is empty, is binary (has zero bytes) or is no UTF-8, with the byte offset.
    """
    files = [Path(paths)] if isinstance(paths, str | os.PathLike) else [Path(path) for path in paths]
    if not files:
        raise ValueError("[read_text] paths must name at least one file, but got none")
    texts = [_read(file) for file in files]
    return "".join(text if text.endswith("\n") else text + "\n" for text in texts[:-1]) + texts[-1]


def split(corpus: S, validation: float = 0.1) -> tuple[S, S]:
    """Cuts text or ids into a part to train on and, from the end, the share `validation` to validate on.

    Args:
        corpus: a str, list, tuple or 1-D tensor of n elements.
        validation: in [0, 1); the first int(n * (1 - validation)) elements are to train on.

    Raises:
        ValueError: a share out of range, or a part that should hold something and would be empty.
    """
    if not 0 <= validation < 1:
        raise ValueError(f"[split] validation must be in [0, 1), but got {validation}")
    cut = int(len(corpus) * (1 - validation))
    if cut == 0 or (validation > 0 and cut == len(corpus)):
        raise ValueError(
            f"[split] both parts must hold something, but {len(corpus)} elements at validation={validation} "
            f"give {cut} and {len(corpus) - cut}"
        )
    return corpus[:cut], corpus[cut:]  # type: ignore[return-value]


def _read(file: Path) -> str:
    data = file.read_bytes()
    if not data:
        raise ValueError(f"[read_text] {file} must hold text, but is empty")
    if (zero := data.find(0)) >= 0:
        raise ValueError(f"[read_text] {file} must be UTF-8 text, but is binary: byte {zero} is zero")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        # e.start counts from behind the byte order mark.
        offset = e.start + len(data) - len(e.object)
        wrong = f"byte {offset} (0x{data[offset]:02x}) is not: {e.reason}"
        raise ValueError(f"[read_text] {file} must be UTF-8 text, but {wrong}") from None
    if not text:
        raise ValueError(f"[read_text] {file} must hold text, but is empty")
    return text
