from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from pyllm.cli.app import Threads, app, set_threads


@app.command()
def bench(
    ops: Annotated[list[str] | None, Argument(metavar="[OP]...", help="Which; default: all.")] = None,
    full: Annotated[bool, Option("--full", help="All sizes, and more time for each: half an hour.")] = False,
    only: Annotated[str, Option(help="What has this in its name: 'bf16', '151936', 'backward'.")] = "",
    csv: Annotated[Path | None, Option(help="Put the figures into this file.")] = None,
    picture: Annotated[Path | None, Option(help="Draw the ratios as a PNG.")] = None,
    table: Annotated[Path | None, Option(help="Measure nothing; print this CSV file's figures in Markdown.")] = None,
    batch: Annotated[list[int] | None, Option(help="generate: sequences decoded together, too.", min=1)] = None,
    seconds: Annotated[float | None, Option(help="For each case. Default: 0.4, or 1 with --full.", min=0)] = None,
    threads: Threads = None,
):
    """Time each compiled operation beside torch; or, by `generate`, whole models beside other engines.

    `goals --table FILE` shows the sizes that have goals.
    """
    from pyllm import benchmarks
    from pyllm.benchmarks import generation, goals

    if ops == ["generate"]:
        if table is not None:
            sys.stdout.write(generation.markdown(generation.load(table)))
        else:
            generation.run(only=only, batches=batch or (), csv=csv)
        return
    if ops == ["goals"]:
        if table is None:
            raise ValueError("[bench] goals are shown of the figures in a CSV file: add --table FILE")
        sys.stdout.write(goals.markdown(benchmarks.load(table)))
        return
    if table is not None:
        sys.stdout.write(benchmarks.markdown(benchmarks.load(table), benchmarks.cases(ops or [], only=only)))
        return
    set_threads(threads)
    benchmarks.run(ops or [], full=full, only=only, seconds=seconds, csv=csv, picture=picture)
