from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pyllm.cli.app import (
    Bar,
    Folder,
    MaxTokens,
    MinP,
    RepetitionPenalty,
    Seed,
    Stop,
    Temperature,
    Threads,
    TopK,
    TopP,
    app,
    err,
    fail,
    load,
    set_threads,
)
from pyllm.engine import Engine, SamplingParams, answer_file
from pyllm.engine.generation import most_tokens, prompt_ids
from pyllm.engine.texts import best_texts
from pyllm.models import Model
from pyllm.text import Tokenizer


@app.command()
def generate(
    folder: Folder,
    prompt: Annotated[str, Argument(help="The text to go on from, or to answer.")] = "",
    prompts: Annotated[
        Path | None,
        Option(help='In its place, a JSONL file: a line has "prompt" or "messages", and may have "id" and settings.'),
    ] = None,
    out: Annotated[
        Path | None, Option(help="The JSONL file for what is said to --prompts. What it has is not done again.")
    ] = None,
    batch: Annotated[int, Option(help="Of --prompts, how many at once.", min=1)] = 32,
    max_tokens: MaxTokens = None,
    temperature: Temperature = 1.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    repetition_penalty: RepetitionPenalty = 1.0,
    seed: Seed = None,
    stop: Stop = None,
    stream: Annotated[bool, Option("--stream", help="Print as it comes.")] = False,
    num_beams: Annotated[
        int, Option("--num-beams", "--beams", help="From 2 on: draw nothing, search for the best with so many.", min=1)
    ] = 1,
    length_penalty: Annotated[
        float | None,
        Option(help="Of beams: above 0 favours long texts, below 0 short ones. Default: the checkpoint's, or 1."),
    ] = None,
    threads: Threads = None,
):
    """Continue a text, or answer it, or those of a file."""
    if (prompts is None) != (out is None):
        raise ValueError("--prompts and --out must be given together")
    if prompts is not None and prompt:
        raise ValueError("a prompt and --prompts must not both be given")
    if prompts is not None and num_beams > 1:
        raise ValueError("--num-beams is for one prompt, not for --prompts")
    if length_penalty is not None and num_beams == 1:
        raise ValueError("--length-penalty must be with --num-beams of 2 or more")
    set_threads(threads)
    model, tokenizer = load(folder)
    params = SamplingParams(temperature, top_k, top_p, min_p, repetition_penalty=repetition_penalty, seed=seed)
    if prompts is not None and out is not None:
        _file(model, tokenizer, prompts, out, params, max_tokens, stop or (), batch)
        return
    params.check()
    said = "" if model.answers else prompt
    if num_beams > 1:
        pieces: Iterable[str] = best_texts(model, tokenizer, [prompt], params, num_beams, max_tokens=max_tokens,
                                           stop=stop or (), stream=stream, length_penalty=length_penalty)  # fmt: skip
    else:
        pieces = _pieces(model, tokenizer, prompt, params, max_tokens, stop or (), stream)
    for piece in pieces:
        sys.stdout.write(said + piece)
        sys.stdout.flush()
        said = ""
    sys.stdout.write(said + "\n")


def _pieces(model: Model, tokenizer: Tokenizer, prompt: str, params: SamplingParams, max_tokens: int | None,
            stop: Sequence[str], stream: bool) -> Iterable[str]:  # fmt: skip
    ids = prompt_ids(model, tokenizer, prompt)
    most = most_tokens(model, len(ids), max_tokens)
    engine = Engine(model, tokenizer, max_sequences=1, max_length=len(ids) + most)
    pieces = engine.stream(ids, params, max_tokens=most, stop=stop)
    return pieces if stream else ["".join(pieces)]


def _file(model: Model, tokenizer: Tokenizer, prompts: Path, out: Path, params: SamplingParams,
          max_tokens: int | None, stop: Sequence[str], batch: int) -> None:  # fmt: skip
    done, total = 0, 0
    with Bar() as bar:

        def progress(now: int, of: int) -> None:
            nonlocal done, total
            done, total = now, of
            bar("generating", now, of)

        try:
            reasons = answer_file(model, tokenizer, prompts, out, params, max_tokens=max_tokens, stop=stop,
                                  batch_size=batch, progress=progress)  # fmt: skip
        except KeyboardInterrupt:
            bar.close()
            fail(f"interrupted: {done:,} of {total:,} are in {out}; the same command goes on from there", 130)
    counts = ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items()))
    err.print(f"saved to {out}: {sum(reasons.values()):,} ({counts})")
    if reasons.get("error"):
        fail(f"{reasons['error']:,} ended with an error, which {out} says", 1)
