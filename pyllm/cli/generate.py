from __future__ import annotations

import sys
from typing import Annotated

from typer import Argument, Option

import pyllm
from pyllm.cli.app import Folder, Threads, app, load, set_threads


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, Argument(help="The text to go on from.")] = "",
    max_tokens: Annotated[int | None, Option(help="Default: 256, or what fits the context.", min=1)] = None,
    temperature: Annotated[float, Option(help="0 is greedy.")] = 1.0,
    top_k: Annotated[int, Option(help="Only the k likeliest; 0 is off.")] = 0,
    top_p: Annotated[float, Option(help="Only the likeliest that make up p.")] = 1.0,
    min_p: Annotated[float, Option(help="Only those at least p times as likely as the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, Option(help="Above 1: against repeating.")] = 1.0,
    seed: Annotated[int | None, Option(help="The same seed gives the same text.")] = None,
    stop: Annotated[list[str] | None, Option(help="End before this text; may be repeated.")] = None,
    stream: Annotated[bool, Option("--stream", help="Print as it comes.")] = False,
    threads: Threads = None,
):
    """Continue a text."""
    set_threads(threads)
    model, tokenizer = load(folder)
    pieces = pyllm.generate(model, tokenizer, prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k,
                            top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed,
                            stop=stop or (), stream=stream)  # fmt: skip
    sys.stdout.write(prompt)
    for piece in [pieces] if isinstance(pieces, str) else pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
