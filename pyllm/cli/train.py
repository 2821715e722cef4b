from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.table import Table
from typer import Option

from pyllm import data as datasets
from pyllm import training
from pyllm.checkpoint import load_checkpoint
from pyllm.cli.app import Data, More, Threads, app, err, fail, out, read_text, set_threads
from pyllm.data import SequenceLoader
from pyllm.models import RWKV, Decoder, LanguageModel, Model
from pyllm.text import Tokenizer
from pyllm.training import History, Metrics


class ModelName(str, Enum):
    rnn = "rnn"
    gru = "gru"
    lstm = "lstm"
    gpt = "gpt"
    rwkv = "rwkv"


VALIDATION_BATCHES = 50
DEFAULTS: dict[str, Any] = {
    "model": "gpt", "tokenizer": "char", "hidden": 256, "layers": 2, "heads": 4, "context": 128, "batch": 16,
    "epochs": 1, "steps": None, "lr": 2e-3, "dropout": 0.0, "seed": 0, "validation": 0.1, "data": [],
}  # fmt: skip


@app.command()
def train(
    out_folder: Annotated[Path, Option("--out", help="The checkpoint folder to write.", show_default=False)],
    model: Annotated[ModelName | None, Option(help="Default: gpt.")] = None,
    data: Data = None,
    more: More = None,
    tokenizer: Annotated[str | None, Option(help="char, bpe:SIZE or unigram:SIZE. Default: char.")] = None,
    hidden: Annotated[int | None, Option(help="Width. Default: 256.", min=1)] = None,
    layers: Annotated[int | None, Option(help="Default: 2.", min=1)] = None,
    heads: Annotated[int | None, Option(help="Heads (gpt, rwkv). Default: 4.", min=1)] = None,
    context: Annotated[int | None, Option(help="Tokens a training sequence. Default: 128.", min=1)] = None,
    batch: Annotated[int | None, Option(help="Sequences a step. Default: 16.", min=1)] = None,
    epochs: Annotated[int | None, Option(help="Default: 1.", min=1)] = None,
    steps: Annotated[int | None, Option(help="Instead of epochs.", min=1)] = None,
    lr: Annotated[float | None, Option(help="Highest learning rate. Default: 0.002.", min=0)] = None,
    dropout: Annotated[float | None, Option(help="Default: 0.", min=0, max=0.99)] = None,
    seed: Annotated[int | None, Option(help="Default: 0.", min=0)] = None,
    validation: Annotated[
        float | None,
        Option(help="Share of the text kept for validation (50 batches at most). Default: 0.1.", min=0, max=0.9),
    ] = None,
    save_every: Annotated[int | None, Option(help="Steps between checkpoints.", min=1)] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the checkpoint in --out.")] = False,
    threads: Threads = None,
):
    """Train a language model on text, from nothing or from an interrupted training's checkpoint."""
    given = {"model": model and model.value, "tokenizer": tokenizer, "hidden": hidden, "layers": layers, "heads": heads,
             "context": context, "batch": batch, "epochs": epochs, "steps": steps, "lr": lr, "dropout": dropout,
             "seed": seed, "validation": validation,
             "data": [str(p.resolve()) for p in [*(data or []), *(more or [])]] or None}  # fmt: skip
    set_threads(threads)
    if resume:
        checkpoint = load_checkpoint(out_folder)
        settings, text_tokenizer = (checkpoint.training or {}).get("settings"), checkpoint.tokenizer
        if not settings or text_tokenizer is None:
            raise ValueError(f"{out_folder} holds no training that `pyllm train` began")
        for name, value in given.items():
            if value is not None and value != settings[name]:
                raise ValueError(f"--{name} was {settings[name]} in {out_folder}, but got {value}: "
                                 "leave it out, or train into another folder")  # fmt: skip
    else:
        if out_folder.exists() and any(out_folder.iterdir()):
            raise ValueError(f"{out_folder} is not empty: add --resume, or give another --out")
        settings = DEFAULTS | {k: v for k, v in given.items() if v is not None}
        text_tokenizer = None
    text = read_text([Path(p) for p in settings["data"]])
    parts = datasets.split(text, settings["validation"])
    if text_tokenizer is None:
        text_tokenizer = Tokenizer.train(settings["tokenizer"], [text])
    torch.manual_seed(settings["seed"])
    network = _new_model(settings, text_tokenizer)
    loaders = [_loader(part, text_tokenizer, settings, training=n == 0)
               for n, part in enumerate(parts) if part]  # fmt: skip
    total = settings["steps"] or settings["epochs"] * len(loaders[0])
    err.print(f"{settings['model']}: {network.num_parameters():,} parameters, vocabulary "
              f"{text_tokenizer.vocab_size:,}, {len(text):,} characters, {total:,} steps")  # fmt: skip
    optimizer = training.AdamW(network.parameters(), lr=settings["lr"], betas=(0.9, 0.99), weight_decay=0.01)
    try:
        history = training.train(network, loaders[0], optimizer, steps=total, schedule=training.warmup_cosine(total),
                                 validation=loaders[1] if len(loaders) > 1 else None,
                                 validate_every=max(1, total // 10), folder=out_folder, tokenizer=text_tokenizer,
                                 save_every=save_every, resume=resume, settings=settings)  # fmt: skip
    except training.Interrupted as e:
        fail(f"{e}; go on with --resume", 130)
    _print_history(history)
    err.print(f"saved to {out_folder}")


def _new_model(settings: dict, tokenizer: Tokenizer) -> Model:
    if settings["model"] == "gpt":
        return Decoder(tokenizer.vocab_size, settings["hidden"], settings["layers"], settings["heads"],
                       context_length=settings["context"], dropout=settings["dropout"])  # fmt: skip
    if settings["model"] == "rwkv":
        if settings["hidden"] % settings["heads"]:
            raise ValueError(f"--hidden must be a multiple of --heads, but got {settings['hidden']} and "
                             f"{settings['heads']}")  # fmt: skip
        return RWKV(tokenizer.vocab_size, settings["hidden"], settings["layers"],
                    head_dim=settings["hidden"] // settings["heads"], dropout=settings["dropout"])  # fmt: skip
    return LanguageModel(tokenizer.vocab_size, settings["hidden"], settings["layers"], settings["dropout"],
                         cell=settings["model"])  # fmt: skip


def _loader(text: str, tokenizer: Tokenizer, settings: dict, training: bool) -> SequenceLoader:
    ids = [*tokenizer.eos_ids[:1], *tokenizer.encode(text)]
    if not training:
        ids = ids[: VALIDATION_BATCHES * settings["batch"] * settings["context"] + 1]
    return SequenceLoader(ids, settings["batch"], settings["context"], seed=settings["seed"],
                          shuffle=training and settings["model"] == "gpt")  # fmt: skip


def _print_history(history: History) -> None:
    table = Table("", "loss", "perplexity", "accuracy")
    recent = history.losses[-50:]
    loss = sum(recent) / len(recent)
    table.add_row("training, last 50 steps", f"{loss:.3f}", f"{Metrics(loss, 0, 1).perplexity:.2f}", "")
    if history.validation:
        m = history.validation[-1][1]
        table.add_row("validation", f"{m.loss:.3f}", f"{m.perplexity:.2f}", f"{m.accuracy:.1%}")
    out.print(table)
