"""Times providers of one operation against each other, and against what the machine can do.

A provider's call is measured in turn with the others', round after round in one process, so that a machine that slows
down slows all of them. A `Case` says how much work a call is: `flops` that must be done and `bytes` that must move. The
floor of its time is the larger of the two at the machine's own ceilings, measured first at the current number of
threads, and `fraction` is that floor over the median time (above 1: the data came from a cache, not from memory).
"""

from __future__ import annotations

import csv
import datetime
import functools
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

import pyllm
from pyllm import _C


@dataclass
class Case:
    op: str  # a name of pyllm.ops
    name: str  # sizes and dtype: "512 x 896 fp32"
    providers: dict[str, Callable[[], object]]  # "pyllm", "torch", "reference" or a peer's name -> one call, set up
    mode: str = "forward"  # or "backward", "forward+backward"
    flops: float = 0
    bytes: float = 0


@dataclass
class Row:
    """What the CSV holds: a provider's time in one case."""

    date: str
    device: str
    isa: str
    threads: int
    pyllm: str
    torch: str
    op: str
    case: str
    mode: str
    provider: str
    p20_us: float
    p50_us: float
    p80_us: float
    gflops: float
    gbytes: float  # per second
    ratio: float  # torch's median over this one: above 1 is faster than torch; nan where torch has no such operation
    fraction: float  # of the ceiling
    peak_gflops: float
    read_gbytes: float


def modes(op: str, name: str, functions: Mapping[str, Callable], tensors: Sequence[Tensor], *, flops: float = 0,
          bytes: float = 0, backward: float | None = None,
          measure: Sequence[str] = ("forward", "backward")) -> Iterator[Case]:  # fmt: skip
    """The cases of functions that take `tensors` and return one tensor or a tuple of them.

    `flops` and `bytes` are the forward pass's; a backward pass is `backward` times as much work (None: no such cases).
    Gradients are asked for every floating-point tensor of `tensors`.
    """
    tensors = [t.detach() for t in tensors]
    work = {"forward": 1.0} | ({} if backward is None else {"backward": backward, "forward+backward": 1 + backward})
    for mode in measure:
        if mode in work:
            providers = {key: _call(f, tensors, mode) for key, f in functions.items()}
            yield Case(op, name, providers, mode, flops * work[mode], bytes * work[mode])


def _call(f: Callable, tensors: list[Tensor], mode: str) -> Callable[[], object]:
    if mode == "forward":
        return functools.partial(f, *tensors)
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    leaves = [t for t in inputs if t.requires_grad]

    def forward() -> list[Tensor]:
        out = f(*inputs)
        return [t for t in ((out,) if isinstance(out, Tensor) else out) if t is not None and t.requires_grad]

    outputs = forward()
    gradients = [torch.randn_like(t) for t in outputs]
    if mode == "backward":
        return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
    return lambda: torch.autograd.grad(forward(), leaves, gradients)


def measure(case: Case, *, quick: bool = False) -> list[Row]:
    """Runs the case's providers in turn until its budget is spent; forward cases without recording for autograd."""
    with torch.set_grad_enabled(case.mode != "forward"):
        samples = _samples(case, quick)
    return [_row(case, name, samples) for name in case.providers]


def _samples(case: Case, quick: bool) -> dict[str, list[float]]:
    budget, least = (0.2, 3) if quick else (1.5, 7)  # seconds, rounds
    samples: dict[str, list[float]] = {name: [] for name in case.providers}
    calls, order = {}, []
    for name, call in case.providers.items():
        seconds = _seconds(call, 1)
        if seconds > 5 * budget:
            samples[name].append(seconds)  # once is enough
            continue
        order.append(name)
        calls[name] = max(1, int(100e-6 / _seconds(call, 1)))  # a sample lasts 100 us or one call
    end, rounds = time.perf_counter() + budget, 0
    collecting = gc.isenabled()
    gc.disable()
    try:
        while order and (rounds < least or time.perf_counter() < end):
            for name in order:
                samples[name].append(_seconds(case.providers[name], calls[name]))
            order.append(order.pop(0))  # no provider always follows the same other
            rounds += 1
            if rounds == 3:  # three rounds are enough of one that is far behind
                best = min(min(s) for s in samples.values())
                order = [name for name in order if min(samples[name]) < 5 * best or name in ("pyllm", "torch")]
    finally:
        if collecting:
            gc.enable()
    return samples


def _seconds(call: Callable[[], object], times: int) -> float:
    start = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - start) / times


def _row(case: Case, provider: str, samples: dict[str, list[float]]) -> Row:
    p20, p50, p80 = (_quantile(samples[provider], q) for q in (0.2, 0.5, 0.8))
    torch_p50 = _quantile(samples["torch"], 0.5) if "torch" in samples else float("nan")
    peak, bandwidth = ceilings(_C.info()["isa"], _C.num_threads())
    floor = max(case.flops / peak, case.bytes / bandwidth) * 1e-9
    return Row(
        date=datetime.datetime.now().isoformat(timespec="seconds"), device=device(), isa=_C.info()["isa"],
        threads=_C.num_threads(), pyllm=pyllm.__version__, torch=torch.__version__, op=case.op, case=case.name,
        mode=case.mode, provider=provider, p20_us=p20 * 1e6, p50_us=p50 * 1e6, p80_us=p80 * 1e6,
        gflops=case.flops / p50 * 1e-9, gbytes=case.bytes / p50 * 1e-9, ratio=torch_p50 / p50, fraction=floor / p50,
        peak_gflops=peak, read_gbytes=bandwidth,
    )  # fmt: skip


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]


@functools.cache
def ceilings(isa: str, threads: int) -> tuple[float, float]:
    """(fp32 GFLOP/s, read GB/s) of this machine at its best, with the instruction set and threads in use now."""

    def best(call: Callable[[], float]) -> float:
        rates, end = [], time.perf_counter() + 0.4
        while time.perf_counter() < end:
            start = time.perf_counter()
            amount = call()
            rates.append(amount / (time.perf_counter() - start) * 1e-9)
        return max(rates)

    data = torch.zeros(64 << 20)

    def read() -> float:
        _C.read(data)
        return data.numel() * 4

    return best(lambda: _C.multiply_add(2_000_000)), best(read)


def device() -> str:
    """The processor's name."""
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def append(path: Path, rows: list[Row]) -> None:
    """Adds the rows to a CSV, with a header where the file is new."""
    new = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)])
        if new:
            writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()} for row in rows)
