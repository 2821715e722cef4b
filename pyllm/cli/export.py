from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.filesize import decimal
from typer import Argument, Option

import pyllm
from pyllm.cli.app import Bar, DType, app, err


@app.command()
def export(
    source: Annotated[Path, Argument(help="A checkpoint of any kind, or owner/name on the Hugging Face hub.")],
    dest: Annotated[Path, Argument(help="The folder or file to write; there must be nothing yet.")],
    gguf: Annotated[bool, Option("--gguf", help="Write a GGUF file, not a Hugging Face folder.")] = False,
    dtype: Annotated[DType | None, Option(help="Of the weights. Default: the source's.")] = None,
):
    """Write a checkpoint for other programs, and compare what comes back from it with the original."""
    with Bar() as bar:
        model, tokenizer = pyllm.load(source, progress=lambda done, total: bar("loading", done, total))
        kind = None if dtype is None else dtype.of_torch
        pyllm.export(model, dest, tokenizer, gguf=gguf, dtype=kind, progress=bar)
    kept = "weights and logits" if tokenizer is None else "weights, logits and tokens"
    kept += "" if tokenizer is None or tokenizer.chat_template is None else ", chat template"
    size = sum(file.stat().st_size for file in ([dest] if dest.is_file() else dest.iterdir()))
    err.print(f"saved to {dest}: {decimal(size)}; {kept} are those of {source}")
