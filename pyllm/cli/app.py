"""What the commands share: the consoles, the arguments that several take, progress, errors."""

from __future__ import annotations

import sys
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from typer import Argument, Option

import pyllm
from pyllm import data as datasets
from pyllm.models import Model
from pyllm.text import Tokenizer

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
                  help=pyllm.__doc__)  # fmt: skip
out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)


Folder = Annotated[Path, Argument(help="A checkpoint folder.", show_default=False)]
Data = Annotated[list[Path] | None, Option(help="UTF-8 text; further files may follow. Default: the embedded corpus.")]
More = Annotated[list[Path] | None, Argument(metavar="[FILE]...", hidden=True)]
Threads = Annotated[int | None, Option(help="CPU threads. Default: torch's.", min=1, max=4096)]
MaxTokens = Annotated[int | None, Option(help="Default: what fits the context, of generate at most 256.", min=1)]
Temperature = Annotated[float, Option(help="0 is greedy.")]
TopK = Annotated[int, Option(help="Only the k likeliest; 0 is off.")]
TopP = Annotated[float, Option(help="Only the likeliest that make up p.")]
MinP = Annotated[float, Option(help="Only those at least p times as likely as the likeliest.")]
RepetitionPenalty = Annotated[float, Option(help="Above 1: against repeating.")]
Seed = Annotated[int | None, Option(help="The same seed gives the same text.")]
Stop = Annotated[list[str] | None, Option(help="End before this text; may be repeated.")]


class DType(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"

    @property
    def of_torch(self) -> torch.dtype:
        return getattr(torch, self.value)


class Bar:
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

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()


def load(folder: Path) -> tuple[Model, Tokenizer]:
    with Bar() as bar:
        model, tokenizer = pyllm.load(folder, progress=lambda done, total: bar("loading", done, total))
    if tokenizer is None:
        raise ValueError(f"{folder} has no tokenizer")
    return model, tokenizer


def read_text(files: list[Path]) -> str:
    return datasets.read_text(files) if files else datasets.embedded_corpus()


def set_threads(threads: int | None) -> None:
    if threads is not None:
        torch.set_num_threads(threads)
        pyllm.set_num_threads(threads)


def main() -> None:
    """Runs the command line. What the user can put right is one line and exit code 2; Ctrl-C is 130."""
    try:
        code = typer.main.get_command(app).main(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", 130)
    except (ValueError, IndexError, OSError, NotImplementedError, FloatingPointError, ImportError) as e:
        fail(str(e), 2)
    except Exception as e:
        if not hasattr(e, "format_message"):  # typer's own errors have one
            raise
        help_asked = type(e).__name__ == "NoArgsIsHelpError"
        print(e.format_message()) if help_asked else fail(e.format_message(), getattr(e, "exit_code", 2))
    else:
        sys.exit(code)


def fail(message: str, code: int) -> NoReturn:
    err.print(f"pyllm: {' '.join(message.split())}", markup=False)
    sys.exit(code)
