"""Finds the bench files, runs them, and shows the rows as a table, a CSV and a picture."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import pyllm
from pyllm import _C
from pyllm.benchmarks.timing import Row, append, ceilings, device, measure


def names() -> dict[str, str]:
    """op -> the module that measures it."""
    found: dict[str, str] = {}
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        module = f"{__package__}.{path.stem}"
        found |= dict.fromkeys(importlib.import_module(module).OPS, module)
    return found


def run(ops: Sequence[str] = (), *, quick: bool = False, only: str = "", csv: Path | None = None,
        picture: Path | None = None) -> list[Row]:  # fmt: skip
    """Measures the named ops (none named: all), prints one table, appends to `csv` and draws `picture`.

    `only` keeps the cases that have it in their name or mode.

    Raises:
        ValueError: an op that has no benchmark.
    """
    known = names()
    for op in ops:
        if op not in known:
            raise ValueError(f"[bench] op must be one of {', '.join(sorted(known))}, but got '{op}'")
    wanted = set(ops or known)
    console = Console(width=None if sys.stdout.isatty() else 120)
    rows: list[Row] = []
    with console.status("measuring the machine") as status:
        peak, bandwidth = ceilings(_C.info()["isa"], _C.num_threads())
        for module in dict.fromkeys(known[op] for op in known if op in wanted):
            for case in importlib.import_module(module).cases():
                if case.op in wanted and only in f"{case.name} {case.mode}":
                    status.update(f"{case.op} {case.name} {case.mode}")
                    rows += measure(case, quick=quick)
                    if csv is not None:
                        append(csv, rows[-len(case.providers) :])
    console.print(table(rows))
    console.print(
        f"{device()}, {_C.info()['isa']}, {_C.num_threads()} threads, pyllm {pyllm.__version__}, torch "
        f"{torch.__version__}. Ceilings: {peak:.0f} GFLOP/s in fp32, reads of {bandwidth:.1f} GB/s."
    )
    if picture is not None:
        draw(rows, picture)
    return rows


def table(rows: Sequence[Row]) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Times: 20th percentile, median, 80th")
    for heading in ("case", "provider", "p20", "p50", "p80", "rate", "torch / it", "of ceiling"):
        shown.add_column(heading, no_wrap=True, justify="left" if heading in ("case", "provider") else "right")
    last = ""
    for row in rows:
        case = f"{row.op} {row.case} {row.mode}"
        ratio = "" if math.isnan(row.ratio) or row.provider == "torch" else f"{row.ratio:.2f}x"
        colour = "" if not ratio or row.provider != "pyllm" else "[green]" if row.ratio >= 1 else "[red]"
        times = (_time(t) for t in (row.p20_us, row.p50_us, row.p80_us))
        fraction = f"{row.fraction:.0%}" if row.fraction else ""
        shown.add_row("" if case == last else case, row.provider, *times, _rate(row), colour + ratio, fraction)
        last = case
    return shown


def _time(us: float) -> str:
    return f"{us:.3g} us" if us < 999.5 else f"{us / 1e3:.3g} ms" if us < 999.5e3 else f"{us / 1e6:.3g} s"


def _rate(row: Row) -> str:  # in the unit that bounds it
    if row.gflops / row.peak_gflops >= row.gbytes / row.read_gbytes:
        return f"{row.gflops:.0f} GFLOP/s" if row.gflops else ""
    return f"{row.gbytes:.3g} GB/s"


def draw(rows: Sequence[Row], path: Path) -> None:
    """A bar for each case: how many times as fast as torch pyllm is. Needs matplotlib."""
    from matplotlib.figure import Figure

    ours = [row for row in rows if row.provider == "pyllm" and not math.isnan(row.ratio)][::-1]
    figure = Figure(figsize=(9, 1.2 + 0.22 * len(ours)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(
        [f"{row.op} {row.case} {row.mode}" for row in ours],
        [row.ratio - 1 for row in ours],
        left=1,
        color=["tab:green" if row.ratio >= 1 else "tab:red" for row in ours],
    )
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    axes.set_xlabel(f"times as fast as torch {torch.__version__}, {_C.num_threads()} threads, {_C.info()['isa']}")
    figure.savefig(path, dpi=150)
