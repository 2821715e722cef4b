"""Generating, raced against other engines on the same weights: `pyllm bench generate`.

Where the peers are installed (benchmarks/peers/README.md), each shape that is there is raced; where they are not, pyllm
runs alone on a small shape that it makes. A rate is tokens per second; only the ratios of one race count.
"""

from __future__ import annotations

import csv
import datetime
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rich.console import Console

import pyllm
from pyllm.benchmarks.timing import device, isa_name, measured_ceilings

HERE = Path(__file__).resolve().parent
PEERS = Path(os.environ.get("PEERS", Path.home() / ".cache/pyllm-peers"))
SHAPES = ("15m", "gpt2", "qwen05", "llama1b")
BITS = ("32", "16", "8", "4")
# Of a shape's weights, which a step reads all; and the bytes of one, with its share of a scale.
WEIGHTS = {"15m": 15_191_712, "gpt2": 124_439_808, "qwen05": 494_032_768, "llama1b": 1_235_814_400}
BYTES = {32: 4, 16: 2, 8: 1 + 1 / 16, 4: 1 / 2 + 1 / 16}
# Of those that each id of a prompt is multiplied with: not embeddings, nor the head, which the last id alone needs.
MULTIPLIED = {"15m": 5_971_968, "gpt2": 84_934_656, "qwen05": 357_826_560, "llama1b": 973_078_528}


@dataclass
class Result:
    """What the CSV holds: a provider's figure in a race."""

    date: str
    device: str
    isa: str
    threads: int
    pyllm: str
    shape: str
    bits: int
    measure: str  # prefill, decode, decode8, ... in tokens a second; load_s; peak_rss_mib
    provider: str
    median: float
    ratio: float  # how many times as good pyllm is, the median over the rounds; 1 for itself
    read_gbytes: float  # the ceilings, just before the race or just after it: what the machine reads per second
    peak_gflops: float = math.nan  # and what it multiplies and adds, in fp32


def run(*, only: str = "", batches: Sequence[int] = (), rounds: int = 3, csv: Path | None = None) -> list[Result]:
    """Races pyllm and prints each race as it ends, and keeps it in `csv`.

    Args:
        only: keeps the races that have it in their name: "15m", "8 bits", "gpt2, 4 bits".
        batches: numbers of sequences decoded together too.

    Raises:
        ValueError: nothing has `only` in its name.
    """
    races = [(shape, bits) for shape in SHAPES for bits in BITS if only in f"{shape}, {bits} bits"]
    if not races:
        raise ValueError(f"[bench] no race has {only!r} in its name")
    console = Console(highlight=False, soft_wrap=True)
    there = [race for race in races if (PEERS / "models" / race[0] / "config.json").exists()]
    results: list[Result] = []
    pyllm.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        if not there:
            console.print(f"No peers in {PEERS} (see benchmarks/peers/README.md): pyllm alone, on a shape of 15M.\n")
            _small_shape(Path(folder))
        for shape, bits in there or [("15m", bits) for bits in BITS]:
            before = measured_ceilings()
            found = _raced(shape, bits, batches, rounds) if there else _alone(Path(folder), bits, batches)
            peak, reads = map(max, before, measured_ceilings())
            results += [_result(shape, bits, reads, peak, *entry) for entry in found]
            console.print("\n".join(_lines(shape, bits, results)))
            if csv is not None:
                save(csv, results)
    return results


def _raced(shape: str, bits: str, batches: Sequence[int], rounds: int) -> list[tuple[str, str, float, float]]:
    add = f"pyllm={sys.executable} {HERE / 'provider.py'} {{folder}} {{bits}} --batch={{batch}}"
    command = [sys.executable, str(HERE / "peers/race.py"), shape, "--bits", bits, "--rounds", str(rounds), "--json",
               "--batch", ",".join(map(str, batches)), "--add", add]  # fmt: skip
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    raced = json.loads(done.stdout.splitlines()[-1])["result"]
    return [(measure, provider, figures["median"], figures["pyllm_ratio"])
            for measure, row in raced.items() for provider, figures in row.items()]  # fmt: skip


def _alone(folder: Path, bits: str, batches: Sequence[int]) -> list[tuple[str, str, float, float]]:
    command = [sys.executable, str(HERE / "provider.py"), str(folder), bits, f"--batch={','.join(map(str, batches))}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return [(measure, "pyllm", figure, 1.0) for measure, figure in json.loads(done.stdout.splitlines()[-1]).items()]


def _small_shape(folder: Path) -> None:
    model = pyllm.Decoder(32000, 288, 6, 6, intermediate_size=768, context_length=1024)
    pyllm.export(model, folder, verify=False)


def _result(shape: str, bits: str, reads: float, peak: float, measure: str, provider: str, median: float,
            ratio: float) -> Result:  # fmt: skip
    return Result(datetime.date.today().isoformat(), device(), isa_name(), 2, pyllm.__version__, shape, int(bits),
                  measure, provider, median, ratio, reads, peak)  # fmt: skip


def _lines(shape: str, bits: str, results: Iterable[Result]) -> list[str]:
    here = [r for r in results if (r.shape, r.bits) == (shape, int(bits))]
    lines = [f"{shape}, {bits} bits"]
    for measure in dict.fromkeys(r.measure for r in here):
        figures = [f"{r.provider} {r.median:.5g}" + ("" if r.provider == "pyllm" else f" ({r.ratio:.2f}x)")
                   for r in here if r.measure == measure]  # fmt: skip
        lines.append(f"  {measure:13}{'  '.join(figures)}")
    return lines


def load(path: Path) -> list[Result]:
    """The figures of a CSV file."""
    kinds = {"str": str, "int": int, "float": float}
    with path.open(newline="") as file:
        return [Result(**{f.name: kinds[str(f.type)](line[f.name]) for f in fields(Result)})
                for line in csv.DictReader(file)]  # fmt: skip


def save(path: Path, results: Iterable[Result]) -> None:
    """Puts figures into a CSV file, in place of those of the same race on the same machine."""

    def race(r: Result) -> tuple:
        return r.device, r.isa, r.shape, r.bits

    results = list(results)
    anew = {race(r) for r in results}
    kept = [r for r in load(path) if race(r) not in anew] if path.exists() else []
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)], lineterminator="\n")
        writer.writeheader()
        for r in (*kept, *results):
            writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(r).items()})
    os.replace(beside, path)


def markdown(results: Sequence[Result]) -> str:
    """A table for each machine: a line for each shape, number of bits and measure, ours beside the best peer's."""
    parts = []
    for machine in dict.fromkeys((r.device, r.isa) for r in results):
        here = [r for r in results if (r.device, r.isa) == machine]
        here.sort(key=lambda r: (SHAPES.index(r.shape), -r.bits))
        ceilings = _span([r.read_gbytes for r in here], "GB/s of reads")
        if peaks := [r.peak_gflops for r in here if not math.isnan(r.peak_gflops)]:
            ceilings = f"{_span(peaks, 'GFLOP/s in fp32')}, {ceilings}"
        lines = []
        for shape, bits, measure in dict.fromkeys((r.shape, r.bits, r.measure) for r in here):
            row = {r.provider: r for r in here if (r.shape, r.bits, r.measure) == (shape, bits, measure)}
            ours, peers = row.pop("pyllm"), sorted(row.values(), key=lambda r: r.ratio)
            others = ", ".join(f"{r.provider} {r.median:.4g} ({r.ratio:.2f}x)" for r in peers)
            lines.append(f"| {shape} | {bits} | {measure} | {ours.median:.4g} | {_share(ours)} | {others or 'none'} |")
        parts.append(f"{machine[0]}, {machine[1]}, 2 threads, {ceilings}.\n\n"
                     "| shape | bits | measure | pyllm | of the ceiling | peers, how many times as good pyllm is |\n"
                     "|---|---|---|---|---|---|\n" + "\n".join(lines))  # fmt: skip
    return "\n\n".join(parts) + "\n"


def _span(figures: Sequence[float], unit: str) -> str:
    slowest, fastest = (f"{f(figures):.0f}" for f in (min, max))
    return f"{slowest} {unit}" if slowest == fastest else f"{slowest} to {fastest} {unit}"


def _share(ours: Result) -> str:
    """Of the reads, where one sequence is decoded; of the multiply-adds in fp32, where a prompt is read."""
    if ours.measure == "decode":
        return f"{ours.median * WEIGHTS[ours.shape] * BYTES[ours.bits] * 1e-9 / ours.read_gbytes:.0%}"
    if ours.measure == "prefill" and not math.isnan(ours.peak_gflops):
        return f"{ours.median * 2 * MULTIPLIED[ours.shape] * 1e-9 / ours.peak_gflops:.0%}"
    return ""
