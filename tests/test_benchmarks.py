"""That the benchmarks run, compare like with like and keep what they say. What they measure is nobody's to assert."""

import dataclasses
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from pyllm import benchmarks, ops
from pyllm.benchmarks import Case, goals, modes
from pyllm.cli import app

ROOT = Path(__file__).parents[1]


def exponentials(name="8"):
    x = torch.randn(8)
    return Case("exp", name, lambda: {"pyllm": x.exp, "torch": lambda: torch.exp(x), "reference": x.exp}, bytes=64)


def test_a_case_becomes_rows():
    rows = benchmarks.measure(exponentials(), seconds=0.01)
    assert [row.provider for row in rows] == ["pyllm", "torch", "reference"]
    for row in rows:
        assert 0 < row.p20_us <= row.p50_us <= row.p80_us
        assert row.ratio > 0 and row.fraction > 0
    assert rows[1].ratio == 1
    assert len(benchmarks.measure(exponentials(), seconds=0.01, reference=False)) == 2


def test_rows_are_kept_and_replaced(tmp_path):
    path = tmp_path / "rows.csv"
    first, other = (benchmarks.measure(exponentials(name), seconds=0.01) for name in ("8", "9"))
    benchmarks.save(path, first)
    benchmarks.save(path, other)
    again = [dataclasses.replace(row, p50_us=1234.5, ratio=math.nan) for row in first]
    benchmarks.save(path, again)
    rows = benchmarks.load(path)
    assert [(row.case, row.provider) for row in rows] == [(row.case, row.provider) for row in (*first, *other)]
    assert [row.p50_us for row in rows[:3]] == [1234.5] * 3 and math.isnan(rows[0].ratio)
    elsewhere = [dataclasses.replace(row, isa="other") for row in first]
    benchmarks.save(path, elsewhere)
    assert len(benchmarks.load(path)) == 9
    assert [p.name for p in tmp_path.iterdir()] == ["rows.csv"]
    benchmarks.draw(first, tmp_path / "ratios.png")
    assert (tmp_path / "ratios.png").stat().st_size > 0


def test_a_file_that_holds_something_else_is_refused_and_kept(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"rows.csv must have the columns date, device, .*, but has a, b"):
        benchmarks.run(["rope"], csv=path)
    assert path.read_text() == "a,b\n1,2\n"


def test_the_markdown_has_a_line_a_size():
    cases = [exponentials("8"), exponentials("9"), exponentials("10")]
    row = benchmarks.measure(cases[0], seconds=0.01)[0]
    row = dataclasses.replace(row, p50_us=1500.0, ratio=2.0, fraction=0.5)
    rows = [row, dataclasses.replace(row, mode="forward+backward", p50_us=12.0), dataclasses.replace(row, case="9")]
    lines = benchmarks.markdown(rows, cases).splitlines()
    assert lines[-2:] == ["| `exp` | 8 | 1.5 ms | 2.00x | 50% | 12 us | 2.00x | 50% |",
                          "| `exp` | 9 | 1.5 ms | 2.00x | 50% |  |  |  |"]  # fmt: skip
    twice = benchmarks.markdown([*rows, dataclasses.replace(row, isa="other")], cases)
    assert twice.count("Ceilings") == 2


def test_goals_are_of_sizes_that_are_measured():
    measured = {(case.op, case.name, case.mode) for case in benchmarks.cases(sizes="full")}
    wanted = [case for _, _, cases in goals.GOALS for case in cases]
    assert wanted and not set(wanted) - measured
    row = benchmarks.measure(exponentials(), seconds=0.01)[0]
    op, name, mode = wanted[0]
    row = dataclasses.replace(row, op=op, case=name, mode=mode, isa="here", ratio=2.5, fraction=0.5)
    lines = goals.markdown([row]).splitlines()
    assert lines[0] == "| kernel | goal | here |" and len(lines) == 2 + len(goals.GOALS)
    assert lines[2].endswith("| 2.50x, 50% / - |") and lines[3].endswith("| - / - |")
    failed = CliRunner().invoke(app, ["bench", "goals"])
    assert isinstance(failed.exception, ValueError) and "add --table FILE" in str(failed.exception)


def test_the_readme_shows_what_was_measured(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    tables = re.findall(r"<!-- pyllm (bench .*?) -->\n(.*?)<!-- end -->", text, re.S)
    assert tables
    for command, shown in tables:
        printed = CliRunner().invoke(app, shlex.split(command)).stdout
        assert shown == printed, f"README.md must have what `{command}` prints"


def test_modes_run_what_they_name():
    seen = []

    def f(x, ids):
        y = x * 2
        seen.append(y.requires_grad)
        return y, None

    def tensors():
        return torch.ones(3), torch.arange(3)

    for case in modes("f", "3", {"pyllm": f}, tensors, flops=3, backward=2):
        assert not seen  # nothing runs before the case is set up
        out = case.setup()["pyllm"]()
        assert seen == [case.mode != "forward"]
        assert case.flops == {"forward": 3, "forward+backward": 9}[case.mode]
        assert len(out) == (2 if case.mode == "forward" else 1)  # the gradient of x
        seen.clear()


def test_every_operation_is_measured():
    functions = {name for name in ops.__all__ if name[0].islower()}
    assert functions <= benchmarks.names().keys(), functions - benchmarks.names().keys()
    for sizes in ("usual", "full"):
        cases = benchmarks.cases(sizes=sizes)
        assert {case.op for case in cases} == benchmarks.names().keys()
        assert len({(case.op, case.name, case.mode) for case in cases}) == len(cases)
        assert all(case.flops + case.bytes > 0 for case in cases)
    usual, full = ({(case.op, case.name) for case in benchmarks.cases(sizes=sizes)} for sizes in ("usual", "full"))
    assert usual <= full, usual - full


@pytest.mark.parametrize("op", sorted(benchmarks.names()))
def test_providers_compute_the_same(op):
    """Every case at a tiny size: the results and gradients of ours, torch's and the reference's."""
    for case in benchmarks.cases([op], "tiny"):
        torch.manual_seed(0)
        results = {name: call() for name, call in case.setup().items()}
        assert {"pyllm", case.against} <= results.keys()
        tolerance = 0.05 if "bf16" in case.name or "bits" in case.name else 1e-4
        for result in results.values():
            if op not in ("sample", "pack_linear", "pack_quantized", "quantized_linear", "alternation"):
                assert_alike(result, results[case.against], tolerance)


def assert_alike(a, b, tolerance):
    a, b = ((t,) if isinstance(t, torch.Tensor) else t for t in (a, b))
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, check_dtype=False)


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, monkeypatch, capsys):
    cases = [exponentials(), Case("exp", "stop", lambda: {"pyllm": interrupt})]
    monkeypatch.setattr(benchmarks.report, "cases", lambda *_: cases)
    with pytest.raises(KeyboardInterrupt):
        benchmarks.run(seconds=0.01, csv=tmp_path / "rows.csv", picture=tmp_path / "ratios.png")
    assert [row.provider for row in benchmarks.load(tmp_path / "rows.csv")] == ["pyllm", "torch"]
    assert (tmp_path / "ratios.png").exists()
    assert "exp 8 forward" in capsys.readouterr().out


def interrupt():
    raise KeyboardInterrupt


def test_what_is_unknown_is_named():
    with pytest.raises(ValueError, match=r"op must be one of .*linear.*, but got 'nothing'"):
        benchmarks.run(["nothing"])
    with pytest.raises(ValueError, match="nothing to measure has 'fp7' in its name"):
        benchmarks.run(["rope"], only="fp7")
