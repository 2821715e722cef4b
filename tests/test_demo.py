import importlib.util
import sys
from pathlib import Path

from pyllm import benchmarks

DEMO = Path(__file__).resolve().parents[1] / "examples" / "demo.py"


def test_the_demo(tmp_path, monkeypatch, capsys):
    """All of it, with a step or two of training, and each operation at a tiny size."""
    spec = importlib.util.spec_from_file_location("demo", DEMO)
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    cases, measure = benchmarks.cases, benchmarks.measure
    small = {case.op for case in cases(sizes="small", only="fp32")}
    monkeypatch.setattr(benchmarks, "cases", lambda sizes, only: cases(sorted(small), "tiny", only))
    monkeypatch.setattr(benchmarks, "measure", lambda case, seconds: measure(case, seconds=0.001))
    monkeypatch.setattr(sys, "argv", ["demo.py", "--out", str(tmp_path), "--steps", "0.002"])
    demo.main()
    printed = capsys.readouterr().out
    assert (tmp_path / "loss.png").stat().st_size > 10_000
    for name in ("lstm", "gpt"):
        assert list((tmp_path / name).glob("checkpoint-*/model.safetensors"))
    for op in small - {"linear"}:  # which is measured forward alone at that size
        assert f" {op} " in printed, printed
