"""The microbenchmarks: a file bench_X.py for each file X of pyllm.ops, and some for what spans several.

A bench file has `OPS`, the names of what it measures (those of pyllm.ops), and `cases(sizes)`, which yields a
`timing.Case` for each thing to measure. `timing` measures a case, `report` finds and runs them, `records` keeps rows.
"""

from pyllm.benchmarks.records import draw, load, markdown, save
from pyllm.benchmarks.report import cases, names, run
from pyllm.benchmarks.timing import Case, Row, ceilings, measure, modes

__all__ = ["Case", "Row", "cases", "ceilings", "draw", "load", "markdown", "measure", "modes", "names", "run", "save"]
