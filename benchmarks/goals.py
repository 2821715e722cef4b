"""Where the kernels stand: the sizes that have goals, and what a CSV file has of them, a column for each machine.

`pyllm bench goals --table FILE` prints it: how many times as fast as torch, and the share of the machine's ceiling.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyllm.benchmarks.timing import Row

FORWARD, BOTH = "forward", "forward+backward"
RECURRENT = ("rnn", "gru", "lstm")


def _all(op: str, sizes: Sequence[str], mode: str = FORWARD) -> list[tuple[str, str, str]]:
    return [(op, size, mode) for size in sizes]


def _attention(dtype: str) -> list[tuple[str, str, str]]:
    return [("attention", f"1 x 2048, 32 heads of 64, causal {dtype}", mode) for mode in (FORWARD, BOTH)]


# What it is, its goal, and the cases of the CSV.
GOALS: list[tuple[str, str, list[tuple[str, str, str]]]] = [
    ("`linear` fp32, 512 x 896 -> 4864, forward / with both gradients", "90 % of the peak",
     [("linear", "512 x 896 -> 4864 fp32", mode) for mode in (FORWARD, BOTH)]),
    ("`linear` fp32, 32 rows / the same packed", "82 % of the peak",
     _all("linear", ["32 x 896 -> 4864 fp32", "32 x 896 -> 4864, packed fp32"])),
    ("`linear` fp32, 1 row -> 4864 / packed / -> 151,936", "95 % of the reads",
     _all("linear", ["1 x 896 -> 4864 fp32", "1 x 896 -> 4864, packed fp32", "1 x 896 -> 151936 fp32"])),
    ("`linear` bf16, 512 / 32 / 1 rows", "1x / 1.3x / 1.3x",
     _all("linear", [f"{rows} x 896 -> 4864 bf16" for rows in (512, 32, 1)])),
    ("`attention` causal, 32 heads of 64, 2,048 keys, fp32, forward / both", "3x / 2x", _attention("fp32")),
    ("the same, bf16", "4x / 2x", _attention("bf16")),
    ("one query, 4,096 keys, 32 heads on 8, fp32 / bf16", "85 % of the reads",
     _all("attention", [f"one query, 4096 keys, 32 heads of 64 on 8 {dtype}" for dtype in ("fp32", "bf16")])),
    *((f"`{norm}` 1 x 896 / 512 x 896 / 4096 x 4096", goal,
       _all(norm, ["1 x 896 fp32", "512 x 896 fp32", "4096 x 4096 fp32"]))
      for norm, goal in (("rms_norm", "3x / 5x / 10x"), ("layer_norm", "1.5x / 2x / 3x"))),
    ("`cross_entropy` 512 x 151,936, both, fp32 / bf16", "8x",
     _all("cross_entropy", ["512 x 151936 fp32", "512 x 151936 bf16"], BOTH)),
    ("`rnn` / `gru` / `lstm`, 2 layers of 256, batch 32, 128 steps, both", "2x / 2.5x / 1.3x",
     [(op, "2 layers, 32 x 128 x 256 fp32", BOTH) for op in RECURRENT]),
    ("the same, batch 1", "3x / 8x / 1.3x", [(op, "2 layers, 1 x 128 x 256 fp32", BOTH) for op in RECURRENT]),
    ("their cells of 256, batch 1", "5x", [(f"{op}_cell", "1 x 256 fp32", FORWARD) for op in RECURRENT]),
    ("`sample` of 151,936, top-k and top-p by hand / top-p", "3x / 200x",
     _all("sample", ["1 x 151936, top-k 50, top-p 0.9 fp32", "1 x 151936, top-p 0.9 fp32"])),
    ("the tutorial's training step, RNN / GRU / LSTM", "2x",
     [("training_step", f"{op}, 10000 tokens, 2 layers of 256, 32 x 64 fp32", BOTH) for op in RECURRENT]),
    ("torch's `mm` in turn with `linear` / `rms_norm`, beside the sum of each alone", "0.91x",
     _all("alternation", ["16 x mm and linear, 32 x 896 fp32", "16 x mm and rms_norm, 32 x 896 fp32"])),
]  # fmt: skip


def markdown(rows: Sequence[Row]) -> str:
    """The table; what a machine has not measured is a dash."""
    ours = {(row.isa, row.op, row.case, row.mode): row for row in rows if row.provider == "pyllm"}
    isas = list(dict.fromkeys(row.isa for row in rows))
    lines = ["| kernel | goal | " + " | ".join(isas) + " |", "|---|---|" + "---|" * len(isas)]
    for name, goal, cases in GOALS:
        cells = [" / ".join(_figures(ours.get((isa, *case))) for case in cases) for isa in isas]
        lines.append(f"| {name} | {goal} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _figures(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row.ratio:.{0 if row.ratio >= 9.95 else 1 if row.ratio >= 2.995 else 2}f}x, {row.fraction:.0%}"
