"""Wrong files are refused at once, for a reason, and before memory is taken for what they promise."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from checkpoint import malformed, refusals
from checkpoint.refusals import read, write

from pyllm.checkpoint import CheckpointError

CASES = refusals.cases()


def test_there_are_many_cases():
    assert len(CASES) > 800 and len({(what, kind) for what, kind, _ in CASES}) == len(CASES)
    files = [tuple(sorted(files.items())) for _, _, files in CASES]
    assert len(set(files)) > 0.99 * len(files)  # a few are wrong for two readers


@pytest.mark.parametrize(
    ("kind", "files"),
    [
        ("safetensors", {"model.safetensors": malformed.safetensors()}),
        ("llama2c", {"m.bin": malformed.llama2c(0)}),
        ("llama2c", {"m.bin": malformed.llama2c(1)}),
        ("gguf", {"m.gguf": malformed.gguf()}),
        ("m.gguf", {"m.gguf": malformed.gguf()}),
        ("m.bin", {"m.bin": malformed.llama2c(0)}),
        ("folder", malformed.folder(malformed.CONFIG)),
    ],
)
def test_the_right_files_are_read(tmp_path, kind, files):
    write(tmp_path, files)
    config, weights = read(kind, tmp_path)
    assert len(weights) in (2, len(malformed.SHAPES))
    for name, weight in weights.items():
        name = {"embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}.get(name, name)
        np.testing.assert_array_equal(weight.numpy(), malformed.values(name))
    for key, value in (config or {}).items():
        assert key not in malformed.CONFIG or value == pytest.approx(malformed.CONFIG[key])


def test_wrong_files_are_refused():
    one = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "MALLOC_ARENA_MAX"), "1")  # no room for threads
    paths = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    done = subprocess.run([sys.executable, "-m", "checkpoint.refusals"], capture_output=True, text=True, timeout=600,
                          env=os.environ | one | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    wrong = []
    for (what, kind, files), case in zip(CASES, found, strict=True):
        fine = case["error"] in ("CheckpointError", "TokenizerError", "ChatTemplateError")
        fine &= case["seconds"] < 0.1 and case["bytes"] < sum(map(len, files.values())) + (16 << 20)
        fine &= "\n" not in case["message"] and 10 < len(case["message"]) < 5000
        if not fine:
            wrong.append(f"{kind}: {what!a:.80}: {case}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("kind", "name", "data"),
    [
        ("safetensors", "model.safetensors", malformed.safetensors()),
        ("llama2c", "m.bin", malformed.llama2c(0)),
        ("llama2c", "m.bin", malformed.llama2c(1)),
        ("gguf", "m.gguf", malformed.gguf()),
    ],
)
def test_any_flipped_bit_of_a_header_is_refused_or_harmless(tmp_path, kind, name, data):
    header = {"safetensors": 2000, "llama2c": 64, "gguf": 1600}[kind]
    for bit in np.random.default_rng(0).integers(0, header * 8, 100):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / name).write_bytes(flipped)
        tracemalloc.start()
        try:
            _, weights = read(kind, tmp_path)
            assert sum(weight.nbytes for weight in weights.values()) <= 4 * len(data)
        except CheckpointError:
            pass
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert peak < len(data) + (16 << 20)
