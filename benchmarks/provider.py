"""pyllm's own part in the race against its peers (benchmarks/peers): one JSON object on the last line.

Usage: python benchmarks/provider.py FOLDER BITS [--batch 8,32]

What is timed is said at the top of peers/providers.py. 16, 8 and 4 bits are the folder's own weights converted once, to
a checkpoint beside them, in a process of its own: the peers' files are converted too, and hold no vocabulary.
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch

import pyllm
from pyllm.engine import generate_ids

THREADS = 2
CONVERSIONS = {
    "16": ("bf16", "model.bfloat16()"),
    "8": ("bf16-int8-128", "model.bfloat16(); model.quantize('int8', group=128)"),
    "4": ("bf16-int4-128", "model.bfloat16(); model.quantize('int4', group=128)"),
}
GREEDY = pyllm.SamplingParams(temperature=0)
SEEDS = itertools.count()


def prompts(vocab_size: int, rows: int, columns: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(next(SEEDS))
    return torch.randint(3, vocab_size, (rows, columns), generator=generator).tolist()


def prefill(model: pyllm.models.Model, engine: pyllm.Engine) -> float:
    (ids,) = prompts(model.vocab_size, 1, 512)
    began = time.perf_counter()
    request = engine.submit(ids, GREEDY, max_tokens=1)
    while request.reason is None:
        engine.step()
    return 512 / (time.perf_counter() - began)


def decode(model: pyllm.models.Model, rows: int, count: int) -> float:
    steps = generate_ids(model, prompts(model.vocab_size, rows, 8), GREEDY, max_tokens=count + 1)
    next(steps)
    began = time.perf_counter()
    assert sum(1 for _ in steps) == count
    return rows * count / (time.perf_counter() - began)


def converted(folder: Path, bits: str) -> Path:
    """The folder's weights in so many bits; made if they are not there yet."""
    name, how = CONVERSIONS[bits]
    out = folder / f"pyllm-{name}"
    if not out.exists():
        code = ("import sys, pyllm; model, _ = pyllm.load(sys.argv[1]); "
                f"{how}; pyllm.save(model, sys.argv[2])")  # fmt: skip
        subprocess.run([sys.executable, "-c", code, folder, out], check=True)
    return out


def measure(folder: Path, bits: str, batches: list[int]) -> dict[str, float]:
    path = converted(folder, bits) if bits in CONVERSIONS else folder
    torch.set_num_threads(THREADS)
    pyllm.set_num_threads(THREADS)
    began = time.perf_counter()
    model = pyllm.load(path, tokenizer=False)[0]
    result = {"load_s": round(time.perf_counter() - began, 3)}
    engine = pyllm.Engine(model, max_sequences=1, max_length=513, chunk=512)
    measures = {"prefill": partial(prefill, model, engine), "decode": partial(decode, model, 1, 64)}
    measures |= {f"decode{rows}": partial(decode, model, rows, 24) for rows in batches}
    for name, one in measures.items():
        for _ in range(2):  # the second records what is replayed from then on
            one()
        result[name] = round(statistics.median(one() for _ in range(3)), 2)
    return result | {"peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("bits", choices=["32", *CONVERSIONS])
    parser.add_argument("--batch", default="", help="sequences decoded together, as 8,32")
    given = parser.parse_args()
    print(json.dumps(measure(given.folder, given.bits, [int(b) for b in given.batch.split(",") if b])))


if __name__ == "__main__":
    main()
