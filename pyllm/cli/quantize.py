from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
from rich.filesize import decimal
from rich.table import Table
from torch import Tensor
from typer import Argument, Option

import pyllm
from pyllm.cli.app import Bar, DType, Threads, app, err, out, read_text, set_threads
from pyllm.cli.evaluate import score
from pyllm.models import Model
from pyllm.quantization import FORMATS
from pyllm.text import Tokenizer

Format = Enum("Format", {name: name for name in FORMATS}, type=str)  # type: ignore[misc]
WINDOWS, LONGEST = 64, 512  # of the calibration text: how many, and tokens of each


@app.command()
def quantize(
    source: Annotated[Path, Argument(help="A checkpoint of any kind, or owner/name on the Hugging Face hub.")],
    to: Annotated[Format, Option(help="Of the weights; int4-min is int4 with a minimum a group.", show_default=False)],
    out_folder: Annotated[Path, Option("--out", help="The checkpoint folder to write.", show_default=False)],
    group: Annotated[
        int,
        Option(help="Elements that share a scale: 32, or 64, 128, 256 (faster prompts, a little coarser)."),
    ] = 32,
    dtype: Annotated[
        DType | None, Option(help="Of what is not quantised, and of computing. Default: the source's.")
    ] = None,
    skip: Annotated[list[str] | None, Option(help="Layers to leave alone, '*.down'; may be repeated.")] = None,
    calibration: Annotated[
        list[Path] | None, Option(help="UTF-8 text by which rounding errors are made up for; may be repeated.")
    ] = None,
    data: Annotated[
        list[Path] | None, Option(help="UTF-8 text to measure the perplexity of, before and after; may be repeated.")
    ] = None,
    threads: Threads = None,
):
    """Turn a checkpoint's weights to 8 or 4 bits."""
    set_threads(threads)
    if out_folder.exists() and not (out_folder.is_dir() and not any(out_folder.iterdir())):
        raise ValueError(f"{out_folder} is not empty: give another --out")
    texts = [read_text(files) if files else None for files in (calibration, data)]
    report = Table("", "bytes", "bits a weight", *(["perplexity"] if data else []))

    def row(what: str, model: Model, tokenizer: Tokenizer | None) -> None:
        size = model.num_bytes()
        cells = [what, decimal(size), f"{8 * size / model.num_parameters():.2f}"]
        if texts[1] is not None and tokenizer is not None:
            cells.append(f"{score(model, tokenizer, texts[1]).perplexity:.4f}")
        report.add_row(*cells)

    with Bar() as bar:
        model, tokenizer = pyllm.load(source, progress=lambda done, total: bar("loading", done, total))
        if tokenizer is None and (calibration or data):
            raise ValueError(f"{source} has no tokenizer for --calibration and --data")
        if model.answers and (calibration or data):
            raise ValueError(f"--calibration and --data are for models that go on with a text, but {source} answers")
        row("before", model, tokenizer)
        batches = None if texts[0] is None or tokenizer is None else _windows(model, tokenizer, texts[0])
        done = model.quantize(to.value, group=group, skip=skip or (), calibration=batches,
                              progress=lambda done, total: bar("quantising", done, total))  # fmt: skip
        if dtype is not None:
            model.to(dtype.of_torch)
        row("after", model, tokenizer)
        pyllm.save(model, out_folder, tokenizer)
    out.print(report)
    err.print(f"saved to {out_folder}: {len(done.layers)} layers as {to.value}")


def _windows(model: Model, tokenizer: Tokenizer, text: str) -> list[Tensor]:
    """Ids (1, T) from all over a text."""
    ids = torch.tensor(tokenizer.encode(text))
    width = min(model.context_length or LONGEST, LONGEST, len(ids))
    if not width:
        raise ValueError("--calibration must have text, but there is none")
    windows = [w[None] for w in ids[: len(ids) // width * width].split(width)]
    return windows[:: -(-len(windows) // WINDOWS)]
