"""pyllm's own part in the mixed load (benchmarks/peers/load.py): one JSON object on the last line.

Usage: python benchmarks/mixed_load.py FOLDER BITS [--rate REQUESTS_A_SECOND] [--requests 200] [--kv-cache-dtype auto]

Beside weights of 8 and 4 bits keys and values are kept in 8 bits, unless it is said otherwise: so does OpenVINO.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import pyllm
from pyllm.benchmarks.peers.mixed import THREADS, TOGETHER, measured, peak_rss_mib, sizes, steps
from pyllm.benchmarks.provider import CONVERSIONS, GREEDY, converted

AT_ONCE = 0.02  # seconds of a step of the engine, at the most


def runner(engine: pyllm.Engine) -> Callable[[list[Any]], None]:
    def run(load: list[Any]) -> None:
        made: list[tuple[Any, Any]] = []

        def submit(request: Any) -> None:
            made.append((request, engine.submit(request.ids, GREEDY, max_tokens=request.tokens)))

        def step(now: Callable[[], float]) -> None:
            engine.step(AT_ONCE)
            for request, ours in made:
                request.had(len(ours.ids), now())
            made[:] = [(request, ours) for request, ours in made if ours.reason is None]

        steps(load, submit, lambda: bool(made), step)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("bits", choices=["32", *CONVERSIONS])
    parser.add_argument("--rate", type=float, default=None)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--kv-cache-dtype", default=None)
    given = parser.parse_args()
    path = converted(given.folder, given.bits) if given.bits in CONVERSIONS else given.folder
    torch.set_num_threads(THREADS)
    pyllm.set_num_threads(THREADS)
    began = time.perf_counter()
    model = pyllm.load(path, tokenizer=False)[0]
    load_s = round(time.perf_counter() - began, 3)
    vocabulary, context = sizes(given.folder)
    engine = pyllm.Engine(model, max_sequences=TOGETHER, max_length=min(context, 1280),
                          kv_cache_dtype=given.kv_cache_dtype or ("int8" if given.bits in ("8", "4") else "auto"),
                          )  # fmt: skip
    out = measured(runner(engine), vocabulary, context, given.requests, given.rate)
    print(json.dumps(out | {"load_s": load_s, "peak_rss_mib": peak_rss_mib()}))


if __name__ == "__main__":
    main()
