"""That the benchmarks run and write what they say. What they measure is nobody's to assert."""

import csv
import importlib

import pytest
import torch

from pyllm import benchmarks, ops
from pyllm.benchmarks import Case, modes, timing


def test_a_case_becomes_rows(tmp_path):
    x = torch.randn(8)
    providers = {"pyllm": x.exp, "torch": lambda: torch.exp(x), "reference": x.exp}
    for _ in range(2):
        timing.append(tmp_path / "rows.csv", timing.measure(Case("exp", "8", providers, bytes=64), quick=True))
    rows = list(csv.DictReader((tmp_path / "rows.csv").read_text().splitlines()))
    assert [row["provider"] for row in rows] == ["pyllm", "torch", "reference"] * 2
    for row in rows:
        assert 0 < float(row["p20_us"]) <= float(row["p50_us"]) <= float(row["p80_us"])
        assert float(row["ratio"]) > 0 and float(row["fraction"]) > 0
    assert {row["ratio"] for row in rows if row["provider"] == "torch"} == {"1"}
    benchmarks.draw(timing.measure(Case("exp", "8", providers), quick=True), tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").stat().st_size > 0


def test_modes_run_what_they_name():
    seen = []

    def f(x, ids):
        y = x * 2
        seen.append(y.requires_grad)
        return y, None

    for case in modes("f", "3", {"pyllm": f}, (torch.randn(3), torch.arange(3)), flops=3, backward=2,
                      measure=("forward", "backward", "forward+backward")):  # fmt: skip
        seen.clear()
        out = case.providers["pyllm"]()
        assert seen == {"forward": [False], "backward": [], "forward+backward": [True]}[case.mode]
        assert case.flops == {"forward": 3, "backward": 6, "forward+backward": 9}[case.mode]
        if case.mode != "forward":
            assert torch.equal(out[0] != 0, torch.ones(3, dtype=torch.bool))


def test_bench_files_measure_ops():
    known = benchmarks.names()
    assert known.keys() <= set(ops.__all__), known.keys() - set(ops.__all__)
    for module in set(known.values()):
        case = next(importlib.import_module(module).cases())
        assert {"pyllm", "torch"} <= case.providers.keys() and case.flops + case.bytes > 0


def test_an_unknown_op_is_named():
    with pytest.raises(ValueError, match=r"op must be one of .*linear.*, but got 'nothing'"):
        benchmarks.run(["nothing"])
