"""Rows kept in a CSV file, and shown as the table of the README or as a picture."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path

from pyllm.benchmarks.timing import Case, Row

_COLUMNS = [f.name for f in fields(Row)]


def load(path: Path) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        ValueError: the file's columns or values are not those of a `Row`.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != _COLUMNS:
            raise ValueError(f"[bench] {path} must have the columns {', '.join(_COLUMNS)}, but has "
                             f"{', '.join(reader.fieldnames or ()) or 'none'}")  # fmt: skip
        try:
            return [Row(**{f.name: {"str": str, "int": int, "float": float}[str(f.type)](line[f.name])
                           for f in fields(Row)}) for line in reader]  # fmt: skip
        except (ValueError, TypeError) as e:
            raise ValueError(f"[bench] {path}, line {reader.line_num}: {e}") from None


def save(path: Path, rows: Iterable[Row]) -> None:
    """Puts rows into a CSV file, in place of those that measured the same on the same machine."""
    kept = {_measured(row): row for row in load(path)} if path.exists() and path.stat().st_size else {}
    kept |= {_measured(row): row for row in rows}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in kept.values():
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()})
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text.getvalue())
    os.replace(beside, path)


def _measured(row: Row) -> tuple:
    return row.device, row.isa, row.threads, row.op, row.case, row.mode, row.provider


def markdown(rows: Sequence[Row], cases: Iterable[Case]) -> str:
    """A table for each machine in the rows: a line for each size of the cases that was measured there."""
    sizes = list(dict.fromkeys((case.op, case.name) for case in cases))
    parts = []
    for device, isa, threads in dict.fromkeys((row.device, row.isa, row.threads) for row in rows):
        here = [row for row in rows if (row.device, row.isa, row.threads) == (device, isa, threads)]
        ours = {(row.op, row.case, row.mode): row for row in here if row.provider == "pyllm"}
        lines = []
        for op, name in sizes:
            found = [ours.get((op, name, mode)) for mode in ("forward", "forward+backward")]
            if any(found):
                lines.append(" | ".join([f"| `{op}`", name, *_cells(found[0]), *_cells(found[1])]) + " |")
        if lines:
            last = max(here, key=lambda row: row.date)
            parts.append(
                f"{device}, {isa}, {threads} threads, torch {last.torch}. Ceilings: {last.peak_gflops:.0f} GFLOP/s in "
                f"fp32, {last.read_gbytes:.1f} GB/s of reads.\n\n"
                "| operation | size | forward | than torch | of ceiling | with backward | than torch | of ceiling |\n"
                "|---|---|---|---|---|---|---|---|\n" + "\n".join(lines)
            )
    return "\n\n".join(parts) + "\n"


def _cells(row: Row | None) -> list[str]:
    return [""] * 3 if row is None else [duration(row.p50_us), f"{row.ratio:.2f}x", f"{row.fraction:.0%}"]


def duration(us: float) -> str:
    return f"{us:.3g} us" if us < 999.5 else f"{us / 1e3:.3g} ms" if us < 999.5e3 else f"{us / 1e6:.3g} s"


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
    machines = {f"torch {row.torch}, {row.threads} threads, {row.isa}" for row in ours}
    axes.set_xlabel("times as fast as " + " or ".join(sorted(machines)))
    figure.savefig(path, dpi=150)
