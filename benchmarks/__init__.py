"""The microbenchmarks: a file bench_X.py for each file X of pyllm.ops, timed by `timing` and shown by `run`.

A bench file has `OPS`, the names of pyllm.ops that it measures, and `cases()`, which yields a `timing.Case` for each
thing to measure. Cases are made one at a time, so that one's tensors are gone before the next one's come.
"""

from pyllm.benchmarks.report import draw, names, run
from pyllm.benchmarks.timing import Case, Row, ceilings, measure, modes

__all__ = ["Case", "Row", "ceilings", "draw", "measure", "modes", "names", "run"]
