from __future__ import annotations

from typing import Annotated

from rich.table import Table
from typer import Option

import pyllm
from pyllm.cli.app import Data, Folder, More, Threads, app, err, load, out, read_text, set_threads
from pyllm.data import SequenceLoader
from pyllm.models import Model
from pyllm.text import Tokenizer
from pyllm.training import Metrics


@app.command()
def evaluate(
    folder: Folder,
    data: Data = None,
    more: More = None,
    context: Annotated[int | None, Option(help="Tokens a window. Default: the model's context, or 256.", min=1)] = None,
    batch: Annotated[int, Option(help="Windows at once.", min=1)] = 16,
    threads: Threads = None,
):
    """Score a text: loss, perplexity, bits a byte, next-token accuracy."""
    set_threads(threads)
    model, tokenizer = load(folder)
    text = read_text([*(data or []), *(more or [])])
    metrics = score(model, tokenizer, text, context, batch)
    table = Table("tokens", "loss", "perplexity", "bits a byte", "accuracy")
    table.add_row(f"{metrics.tokens:,}", f"{metrics.loss:.4f}", f"{metrics.perplexity:.3f}",
                  f"{metrics.bits_per_byte(len(text.encode())):.4f}", f"{metrics.accuracy:.2%}")  # fmt: skip
    out.print(table)


def score(model: Model, tokenizer: Tokenizer, text: str, context: int | None = None, batch: int = 16) -> Metrics:
    """How well a model predicts a text, in windows side by side."""
    ids = tokenizer.encode(text)
    unknown = 0 if tokenizer.unknown_id is None else ids.count(tokenizer.unknown_id)
    if unknown:
        err.print(f"{unknown:,} of {len(ids):,} tokens are unknown to the tokenizer: their bits a byte mean little")
    if tokenizer.eos_id is not None and not (ids and ids[0] == tokenizer.bos_id):  # what the first token follows
        ids.insert(0, tokenizer.eos_id)
    context = min(context or model.context_length or 256, len(ids) - 1)
    batch = max(1, min(batch, (len(ids) - 1) // context))
    return pyllm.test(model, SequenceLoader(ids, batch, context, drop_last=False))
