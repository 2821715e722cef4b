"""Wrong files are refused at once, for a reason, and before memory is taken for what they promise."""

import tracemalloc

import numpy as np
import pytest
from checkpoint import malformed

import pyllm
from pyllm.checkpoint import CheckpointError
from pyllm.checkpoint.gguf import open_gguf
from pyllm.checkpoint.llama2c import open_llama2c
from pyllm.checkpoint.safetensors import open_shards

CASES = list(malformed.cases())
GGUF_NAMES = {malformed.gguf_name(name): name for name in malformed.SHAPES}


def read(kind, folder):
    """The config, if there is one, and all weights."""
    if kind == "folder" or kind.startswith("m."):
        model, _ = pyllm.load(folder if kind == "folder" else folder / kind)
        return None, {name: model.state_dict()[name] for name in ("embedding.weight", "norm.weight")}
    if kind == "llama2c":
        config, reader = open_llama2c(folder / "m.bin")
    elif kind == "gguf":
        reader = open_gguf(folder / "m.gguf")
    else:
        config, reader = None, open_shards(folder)
    with reader:
        if kind == "gguf":
            config = reader.config
        return config, {GGUF_NAMES.get(name, name): reader.read(name) for name in reader.entries()}


def write(folder, files):
    for name, data in files.items():
        (folder / name).write_bytes(data)


def test_there_are_many_cases():
    assert len(CASES) > 200 and len({(what, kind) for what, kind, _ in CASES}) == len(CASES)


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


@pytest.mark.parametrize(("kind", "files"), [case[1:] for case in CASES], ids=[f"{k}: {w}" for w, k, _ in CASES])
def test_a_wrong_file_is_refused(tmp_path, kind, files):
    write(tmp_path, files)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            read(kind, tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < sum(map(len, files.values())) + (16 << 20)
    message = str(error.value)
    assert message.startswith(str(tmp_path)) and "\n" not in message and len(message) < 5000


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
