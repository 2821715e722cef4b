"""Finds the bench files, runs what they measure, and shows each row as it comes."""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import pyllm
from pyllm import _C
from pyllm.benchmarks.records import draw, duration, save
from pyllm.benchmarks.timing import Case, Row, ceilings, device, isa_name, measure


def names() -> dict[str, str]:
    """What is measured -> the module that measures it."""
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        module = f"{__package__}.{path.stem}"
        found |= dict.fromkeys(importlib.import_module(module).OPS, module)
    return found


def cases(ops: Sequence[str] = (), sizes: str = "usual", only: str = "") -> list[Case]:
    """What the bench files measure of the ops (none named: all), without the tensors for it.

    Args:
        sizes: "tiny", "small" (one of each op in training a small model, also by the reference), "usual" or "full".
        only: keeps the cases that have it in their name or mode.

    Raises:
        ValueError: an op that has no benchmark.
    """
    known = names()
    for op in ops:
        if op not in known:
            raise ValueError(f"[bench] op must be one of {', '.join(sorted(known))}, but got '{op}'")
    wanted = [op for op in known if not ops or op in ops]
    modules = dict.fromkeys(known[op] for op in wanted)
    return [case for module in modules for case in importlib.import_module(module).cases(sizes)
            if case.op in wanted and only in f"{case.name} {case.mode}"]  # fmt: skip


def run(ops: Sequence[str] = (), *, full: bool = False, only: str = "", seconds: float | None = None,
        csv: Path | None = None, picture: Path | None = None) -> list[Row]:  # fmt: skip
    """Measures the ops (none named: all) beside torch and prints each row as it comes.

    What was measured until an interruption is printed, kept in `csv` and drawn.

    Args:
        full: all sizes rather than the usual ones.
        only: keeps the cases that have it in their name or mode.
        seconds: how long each case is measured for; 0.4 by default, 1 in full.
        csv: a file for the rows; they take the places of those of earlier runs on the same machine.
        picture: a PNG of the ratios.

    Raises:
        ValueError: an op that has no benchmark, nothing that has `only` in its name, or a CSV file of other columns.
    """
    chosen = cases(ops, "full" if full else "usual", only)
    if not chosen:
        raise ValueError(f"[bench] nothing to measure has {only!r} in its name")
    if csv is not None:
        save(csv, [])
    console = Console(highlight=False, soft_wrap=True)
    peak, bandwidth = ceilings(_C.info()["isa"], _C.num_threads())
    console.print(f"{device()}, {isa_name()}, {_C.num_threads()} threads, pyllm {pyllm.__version__}, "
                  f"torch {torch.__version__}. Ceilings: {peak:.0f} GFLOP/s in fp32, {bandwidth:.1f} GB/s of reads.\n"
                  )  # fmt: skip
    console.print(_line("", "20 %", "median", "80 %", "rate", "ratio", "of ceiling"), style="bold")
    rows: list[Row] = []
    columns = MofNCompleteColumn(), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=len(chosen))
            for case in chosen:
                title = f"{case.op} {case.name} {case.mode}"
                progress.update(task, description=title)
                measured = measure(case, seconds=seconds or (1.0 if full else 0.4), reference=False)
                rows += measured
                console.print(title, style="bold")
                for row in measured:
                    console.print(_shown(row, case.against))
                if csv is not None:
                    save(csv, measured)
                progress.advance(task)
    finally:
        if picture is not None and rows:
            draw(rows, picture)
    return rows


def _shown(row: Row, against: str) -> Text:
    ratio = "" if math.isnan(row.ratio) or row.provider == against else f"{row.ratio:.2f}x"
    style = "" if not ratio or row.provider != "pyllm" else "green" if row.ratio >= 1 else "red"
    times = [duration(t) for t in (row.p20_us, row.p50_us, row.p80_us)]
    return Text(_line(row.provider, *times, _rate(row), ratio, f"{row.fraction:.0%}"), style)


def _line(provider: str, *cells: str) -> str:
    widths = 8, 8, 8, 12, 7, 10
    return f"  {provider:9}" + "".join(f" {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))


def _rate(row: Row) -> str:  # in the unit that bounds it
    if row.gflops / row.peak_gflops >= row.gbytes / row.read_gbytes:
        return f"{row.gflops:.0f} GFLOP/s"
    return f"{row.gbytes:.3g} GB/s"
