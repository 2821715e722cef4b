from __future__ import annotations

from typing import Annotated

import torch
from rich.table import Table
from typer import Option

from pyllm.cli.app import Data, Folder, More, Threads, app, err, load, out, read_text, set_threads
from pyllm.engine import Engine
from pyllm.models import Model
from pyllm.text import Tokenizer
from pyllm.training import Metrics

LONGEST = 1024


@app.command()
def evaluate(
    folder: Folder,
    data: Data = None,
    more: More = None,
    context: Annotated[
        int | None, Option(help="Tokens a window. Default: the model's context, at most 1024, or all.", min=1)
    ] = None,
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
    """How well a model predicts a text, cut into windows of `context` tokens, which know nothing of each other."""
    if model.answers:
        raise ValueError("a text is scored by models that go on with texts, but this one answers them")
    ids = tokenizer.encode(text)
    unknown = 0 if tokenizer.unknown_id is None else ids.count(tokenizer.unknown_id)
    if unknown:
        err.print(f"{unknown:,} of {len(ids):,} tokens are unknown to the tokenizer: their bits a byte mean little")
    if tokenizer.eos_id is not None and not (ids and ids[0] == tokenizer.bos_id):  # what the first token follows
        ids.insert(0, tokenizer.eos_id)
    tokens = len(ids) - 1
    if tokens < 1:
        raise ValueError("a text must have at least 1 token to score, but there is none")
    if context is None:
        context = tokens if model.context_length is None else min(model.context_length, LONGEST)
    context = min(context, tokens)
    windows = [ids[i : i + context + 1] for i in range(0, tokens, context)]
    scores = Engine(model, max_sequences=min(batch, len(windows)), max_length=context).score(windows)
    logprobs, first_choices = (torch.cat([getattr(s, name) for s in scores]) for name in ("logprobs", "first_choices"))
    return Metrics(-float(logprobs.double().mean()), float(first_choices.double().mean()), tokens)
