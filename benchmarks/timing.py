"""Times providers of one operation against each other, and against what the machine can do.

A provider's call is measured in turn with the others', round after round in one process, so that a machine that slows
down slows all of them. A `Case` says how much work a call is: `flops` that must be done and `bytes` that must move. The
floor of its time is the larger of the two at the machine's own ceilings, measured first at the current number of
threads, and `fraction` is that floor over the median time (above 1: the data came from a cache, not from memory).
"""

from __future__ import annotations

import datetime
import functools
import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import pyllm
from pyllm import _C

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Providers = Mapping[str, Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """Something to measure. Its tensors are made by `setup`, when it comes to that."""

    op: str  # one of the bench file's OPS
    name: str  # sizes and dtype: "512 x 896 fp32"
    setup: Callable[[], Providers]  # gives "pyllm", "torch", "reference" or a peer's name -> one call
    mode: str = "forward"  # or "forward+backward"
    flops: float = 0
    bytes: float = 0
    against: str = "torch"  # the provider whose time is compared with the others'


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
    ratio: float  # the compared provider's median over this one: above 1 is faster; nan where there is no such provider
    fraction: float  # of the ceiling
    peak_gflops: float
    read_gbytes: float


def modes(op: str, name: str, functions: Mapping[str, Callable], tensors: Callable[[], Sequence[Tensor]], *,
          flops: float = 0, bytes: float = 0, backward: float | None = None) -> Iterator[Case]:  # fmt: skip
    """The cases of functions that take what `tensors` makes and return one tensor or a tuple of them.

    `flops` and `bytes` are the forward pass's; a backward pass is `backward` times as much work (None: no such cases).
    Gradients are asked for every floating-point tensor.
    """
    work = {"forward": 1.0} | ({} if backward is None else {"forward+backward": 1 + backward})
    for mode, times in work.items():
        setup = functools.partial(_calls, functions, tensors, mode)
        yield Case(op, name, setup, mode, flops * times, bytes * times)


def _calls(functions: Mapping[str, Callable], tensors: Callable[[], Sequence[Tensor]], mode: str) -> Providers:
    made = [t.detach() for t in tensors()]
    return {name: _call(f, made, mode) for name, f in functions.items()}


def _call(f: Callable, tensors: Sequence[Tensor], mode: str) -> Callable[[], Any]:
    if mode == "forward":
        return functools.partial(f, *tensors)
    _import_for_gradients()
    inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    leaves = [t for t in inputs if t.requires_grad]

    gradients: list[Tensor] = []

    def step() -> tuple[Tensor, ...]:
        out = f(*inputs)
        outputs = [t for t in ((out,) if isinstance(out, Tensor) else out) if t is not None and t.requires_grad]
        if not gradients:  # the same for all providers
            same = torch.Generator().manual_seed(1)
            gradients.extend(torch.randn(t.shape, generator=same).to(t.dtype) for t in outputs)
        return torch.autograd.grad(outputs, leaves, gradients)

    return step


@functools.cache
def _import_for_gradients() -> None:
    """The first gradient that is given lets torch import a good deal, which is the time of no provider."""
    with torch.enable_grad():
        x = torch.ones(1, requires_grad=True)
        torch.autograd.grad([x * 1], [x], [torch.ones(1)])


def measure(case: Case, *, seconds: float = 0.4, reference: bool = True) -> list[Row]:
    """Runs the case's providers, with or without the reference, in turn for about so long."""
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(case.mode != "forward"):
        torch.manual_seed(0)
        providers = {name: call for name, call in case.setup().items() if reference or name != "reference"}
        samples = _samples(providers, case.against, seconds)
    return [_row(case, name, samples) for name in samples]


def _samples(providers: Providers, against: str, budget: float) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {name: [] for name in providers}
    calls, order = {}, []
    for name, call in providers.items():
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
        while order and (rounds < 5 or time.perf_counter() < end):
            for name in order:
                samples[name].append(_seconds(providers[name], calls[name]))
            order.append(order.pop(0))  # no provider always follows the same other
            rounds += 1
            if rounds == 3:  # three rounds are enough of one that is far behind
                best = min(min(s) for s in samples.values())
                order = [name for name in order if min(samples[name]) < 5 * best or name in ("pyllm", against)]
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
    other = _quantile(samples[case.against], 0.5) if case.against in samples else float("nan")
    peak, bandwidth = ceilings(_C.info()["isa"], _C.num_threads())
    floor = max(case.flops / peak, case.bytes / bandwidth) * 1e-9
    return Row(
        date=datetime.datetime.now().isoformat(timespec="seconds"), device=device(), isa=isa_name(),
        threads=_C.num_threads(), pyllm=pyllm.__version__, torch=torch.__version__, op=case.op, case=case.name,
        mode=case.mode, provider=provider, p20_us=p20 * 1e6, p50_us=p50 * 1e6, p80_us=p80 * 1e6,
        gflops=case.flops / p50 * 1e-9, gbytes=case.bytes / p50 * 1e-9, ratio=other / p50, fraction=floor / p50,
        peak_gflops=peak, read_gbytes=bandwidth,
    )  # fmt: skip


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[round(q * (len(values) - 1))]


@functools.cache
def ceilings(isa: str, threads: int) -> tuple[float, float]:
    """`measured_ceilings` as they were the first time with this instruction set and number of threads."""
    return measured_ceilings()


def measured_ceilings() -> tuple[float, float]:
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


def isa_name() -> str:
    info = _C.info()
    return info["isa"] + (" with tile registers" if info["amx"] else "")


@functools.cache
def device() -> str:
    """The processor's name and how many cores this process has of it."""
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
    return f"{name}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} cores"
