"""The command line: `pyllm train | generate | evaluate | export | bench | info`."""

from __future__ import annotations

import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch
import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer import Argument, Option

import pyllm
from pyllm import data as datasets
from pyllm import training
from pyllm.checkpoint import describe, load_checkpoint
from pyllm.data import SequenceLoader
from pyllm.models import RWKV, Decoder, LanguageModel, Model
from pyllm.text import Tokenizer
from pyllm.training import History, Metrics

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help=pyllm.__doc__)  # fmt: skip
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


class ModelName(str, Enum):
    rnn = "rnn"
    gru = "gru"
    lstm = "lstm"
    gpt = "gpt"
    rwkv = "rwkv"


class DType(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


VALIDATION_BATCHES = 50
DEFAULTS: dict[str, Any] = {
    "model": "gpt", "tokenizer": "char", "hidden": 256, "layers": 2, "heads": 4, "context": 128, "batch": 16,
    "epochs": 1, "steps": None, "lr": 2e-3, "dropout": 0.0, "seed": 0, "validation": 0.1, "data": [],
}  # fmt: skip

Folder = Annotated[Path, Argument(help="A checkpoint folder.", show_default=False)]
Data = Annotated[list[Path] | None, Option(help="UTF-8 text; further files may follow. Default: the embedded corpus.")]
More = Annotated[list[Path] | None, Argument(metavar="[FILE]...", hidden=True)]
Threads = Annotated[int | None, Option(help="CPU threads. Default: torch's.", min=1, max=4096)]


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
    _set_threads(threads)
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
    text = _text([Path(p) for p in settings["data"]])
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
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=settings["lr"], betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    try:
        history = training.train(network, loaders[0], optimizer, steps=total, schedule=training.warmup_cosine(total),
                                 validation=loaders[1] if len(loaders) > 1 else None,
                                 validate_every=max(1, total // 10), folder=out_folder, tokenizer=text_tokenizer,
                                 save_every=save_every, resume=resume, settings=settings)  # fmt: skip
    except training.Interrupted as e:
        _fail(f"{e}; go on with --resume", 130)
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


def _text(files: list[Path]) -> str:
    return datasets.read_text(files) if files else datasets.embedded_corpus()


def _print_history(history: History) -> None:
    table = Table("", "loss", "perplexity", "accuracy")
    recent = history.losses[-50:]
    loss = sum(recent) / len(recent)
    table.add_row("training, last 50 steps", f"{loss:.3f}", f"{Metrics(loss, 0, 1).perplexity:.2f}", "")
    if history.validation:
        m = history.validation[-1][1]
        table.add_row("validation", f"{m.loss:.3f}", f"{m.perplexity:.2f}", f"{m.accuracy:.1%}")
    out.print(table)


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
    _set_threads(threads)
    model, tokenizer = _load(folder)
    pieces = pyllm.generate(model, tokenizer, prompt, max_tokens=max_tokens, temperature=temperature, top_k=top_k,
                            top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty, seed=seed,
                            stop=stop or (), stream=stream)  # fmt: skip
    sys.stdout.write(prompt)
    for piece in [pieces] if isinstance(pieces, str) else pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


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
    _set_threads(threads)
    model, tokenizer = _load(folder)
    text = _text([*(data or []), *(more or [])])
    ids = tokenizer.encode(text)
    unknown = 0 if tokenizer.unknown_id is None else ids.count(tokenizer.unknown_id)
    if unknown:
        err.print(f"{unknown:,} of {len(ids):,} tokens are unknown to the tokenizer: their bits a byte mean little")
    if tokenizer.eos_id is not None and not (ids and ids[0] == tokenizer.bos_id):  # what the first token follows
        ids.insert(0, tokenizer.eos_id)
    context = min(context or model.context_length or 256, len(ids) - 1)
    batch = max(1, min(batch, (len(ids) - 1) // context))
    metrics = pyllm.test(model, SequenceLoader(ids, batch, context, drop_last=False))
    table = Table("tokens", "loss", "perplexity", "bits a byte", "accuracy")
    table.add_row(f"{metrics.tokens:,}", f"{metrics.loss:.4f}", f"{metrics.perplexity:.3f}",
                  f"{metrics.bits_per_byte(len(text.encode())):.4f}", f"{metrics.accuracy:.2%}")  # fmt: skip
    out.print(table)


@app.command()
def bench(
    ops: Annotated[list[str] | None, Argument(metavar="[OP]...", help="Which; default: all.")] = None,
    full: Annotated[bool, Option("--full", help="All sizes, and more time for each: half an hour.")] = False,
    only: Annotated[str, Option(help="What has this in its name: 'bf16', '151936', 'backward'.")] = "",
    csv: Annotated[Path | None, Option(help="Put the figures into this file.")] = None,
    picture: Annotated[Path | None, Option(help="Draw the ratios as a PNG.")] = None,
    table: Annotated[Path | None, Option(help="Measure nothing; print this CSV file's figures in Markdown.")] = None,
    seconds: Annotated[float | None, Option(help="For each case. Default: 0.4, or 1 with --full.", min=0)] = None,
    threads: Threads = None,
):
    """Time each compiled operation beside torch."""
    from pyllm import benchmarks

    if table is not None:
        sys.stdout.write(benchmarks.markdown(benchmarks.load(table), benchmarks.cases(ops or [], only=only)))
        return
    _set_threads(threads)
    benchmarks.run(ops or [], full=full, only=only, seconds=seconds, csv=csv, picture=picture)


@app.command()
def export(
    source: Annotated[Path, Argument(help="A checkpoint of any kind, or owner/name on the Hugging Face hub.")],
    dest: Annotated[Path, Argument(help="The folder or file to write; there must be nothing yet.")],
    gguf: Annotated[bool, Option("--gguf", help="Write a GGUF file, not a Hugging Face folder.")] = False,
    dtype: Annotated[DType | None, Option(help="Of the weights. Default: the source's.")] = None,
):
    """Write a checkpoint for other programs, and compare what comes back from it with the original."""
    with _Bar() as bar:
        model, tokenizer = pyllm.load(source, progress=lambda done, total: bar("loading", done, total))
        kind = None if dtype is None else getattr(torch, dtype.value)
        pyllm.export(model, dest, tokenizer, gguf=gguf, dtype=kind, progress=bar)
    kept = "weights and logits" if tokenizer is None else "weights, logits and tokens"
    kept += "" if tokenizer is None or tokenizer.chat_template is None else ", chat template"
    size = sum(file.stat().st_size for file in ([dest] if dest.is_file() else dest.iterdir()))
    err.print(f"saved to {dest}: {decimal(size)}; {kept} are those of {source}")


@app.command()
def info(
    path: Annotated[Path | None, Argument(help="A checkpoint of any kind.", show_default=False)] = None,
):
    """Version, instruction sets, threads, devices, operations; or what a checkpoint is, and what loading it takes."""
    if path is not None:
        out.print(_description(describe(path)))
        return
    facts = pyllm.info()
    table = Table(show_header=False)
    for name, value in facts.items():
        if name != "ops":
            table.add_row(name.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value))
    out.print(table)
    backends = Table("operation", "backends")
    for name, where in facts["ops"].items():
        backends.add_row(name, ", ".join(where))
    out.print(backends)


def _description(facts: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    told = facts["tokenizer"]
    text = "none"
    if told is not None:
        text = f"{told['kind']}, vocabulary {told['vocabulary']:,}"
        text += f", BOS {told['bos']}{' (always)' if told['add_bos'] else ''}" if told["bos"] else ""
        text += f", EOS {' '.join(told['eos'])}" if told["eos"] else ""
        text += ", chat template" if told["chat_template"] else ""
    widened = facts["memory"] > 1.01 * facts["disk"]
    whole, of = (facts["memory"], "the weights when widened") if widened else (facts["disk"], "the files")
    rows = {
        "family": facts["family"] or "none",
        "model": facts["model"],
        "config": ", ".join(f"{k} {v}" for k, v in facts["config"].items() if v is not None and v is not False),
        "parameters": f"{facts['parameters']:,}",
        "dtypes": ", ".join(facts["dtypes"]),
        "stored as": ", ".join(f"{kind} ({count})" for kind, count in (facts["stored"] or {}).items()),
        "context": "no limit" if facts["context"] is None else f"{facts['context']:,}",
        "tokenizer": text,
        "on disk": decimal(facts["disk"]),
        "in memory": decimal(facts["memory"]),
        "peak while loading": f"{decimal(facts['peak'])}, {facts['peak'] / whole:.2f} of {of}",
    }
    for name, value in rows.items():
        if value:
            table.add_row(name, value)
    return table


class _Bar:
    """How far something is, where that is long and a terminal looks on."""

    def __init__(self) -> None:
        self.began, self.task = time.perf_counter(), TaskID(0)
        self.bar: Progress | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.bar is None and err.is_terminal and time.perf_counter() > self.began + 1:
            columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn()
            self.bar = Progress(*columns, console=err, transient=True)
            self.task = self.bar.add_task(what)
            self.bar.start()
        if self.bar is not None:
            self.bar.update(self.task, description=what, completed=done, total=total)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()


def _load(folder: Path) -> tuple[Model, Tokenizer]:
    with _Bar() as bar:
        model, tokenizer = pyllm.load(folder, progress=lambda done, total: bar("loading", done, total))
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer")
    return model, tokenizer


def _set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
        pyllm.set_num_threads(threads)


def main() -> None:
    """Runs the command line. What the user can put right is one line and exit code 2; Ctrl-C is 130."""
    try:
        code = typer.main.get_command(app).main(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", 130)
    except (ValueError, IndexError, OSError, NotImplementedError, FloatingPointError, ImportError) as e:
        _fail(str(e), 2)
    except Exception as e:
        if not hasattr(e, "format_message"):  # typer's own errors have one
            raise
        help_asked = type(e).__name__ == "NoArgsIsHelpError"
        print(e.format_message()) if help_asked else _fail(e.format_message(), getattr(e, "exit_code", 2))
    else:
        sys.exit(code)


def _fail(message: str, code: int) -> NoReturn:
    err.print(f"pyllm: {' '.join(message.split())}", markup=False)
    sys.exit(code)
