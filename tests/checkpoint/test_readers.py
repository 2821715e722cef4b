"""Readers give what the files hold: in pieces, in other dtypes, and widened."""

import importlib.util
import json
import struct

import gguf
import numpy as np
import pytest
import torch
from checkpoint import malformed

from pyllm.checkpoint import CheckpointError, reader, safetensors
from pyllm.checkpoint import gguf as ours
from pyllm.checkpoint.gguf import open_gguf
from pyllm.checkpoint.safetensors import open_shards, open_tensors, write_tensors
from pyllm.nn.position import rope_frequencies

PACKED = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(reader, "_PIECE", 7)
    monkeypatch.setattr(ours, "_PIECE", 512)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16, torch.float16])
def test_any_float_dtype_is_read_into_any_other(tmp_path, stored, wanted):
    tensors = {"a": torch.randn(5, 9).to(stored), "b": torch.randn(3, 0).to(stored), "c": torch.tensor(3.25).to(stored)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    with open_tensors(tmp_path / "x.safetensors") as weights:
        assert weights.entries() == {name: (stored, tuple(tensor.shape)) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            out = None if wanted is None else torch.full(tensor.shape, torch.nan, dtype=wanted)
            got = weights.read(name, out)
            assert out is None or got is out
            torch.testing.assert_close(got, tensor.to(wanted or stored), rtol=0, atol=0)
        joined = torch.nn.Parameter(torch.zeros(10, 9, dtype=wanted or stored))
        weights.read("a", joined[5:])
        assert torch.equal(joined[5:], tensors["a"].to(joined.dtype)) and not joined[:5].any()


def test_what_cannot_be_filled_is_refused(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"a": torch.randn(4, 6), "n": torch.arange(3)})
    with open_tensors(tmp_path / "x.safetensors") as weights:
        for out in (torch.empty(6, 4), torch.empty(6, 4).T, torch.empty(4, 6, dtype=torch.int32)):
            with pytest.raises(ValueError, match=r"\[read\] out must"):
                weights.read("a", out)
        with pytest.raises(ValueError, match=r"\[read\] out must hold n's torch.int64, but got torch.float32"):
            weights.read("n", torch.empty(3))
        with pytest.raises(KeyError):
            weights.read("b")
        with open(tmp_path / "x.safetensors", "r+b") as file:
            file.truncate(100)
        with pytest.raises(CheckpointError, match="but the file ends"):
            weights.read("a")


def test_weights_are_mapped_where_they_lie(tmp_path):
    path, other = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(2, 5), "c": torch.randn(4).half(), "d": torch.randn(0, 5)}
    write_tensors(path, tensors)
    with open_tensors(path, mapped=True) as weights:
        joined, alone, half = weights.map(["a", "b"]), weights.map(["b"]), weights.map(["c"])
        assert weights.map(["b", "a"]) is None and weights.map(["d"]) is None
        converted = weights.read("a", torch.empty(3, 5, dtype=torch.float64))
    with open_tensors(path) as weights:
        assert weights.map(["a"]) is None
    assert torch.equal(joined, torch.cat((tensors["a"], tensors["b"]))) and torch.equal(half, tensors["c"])
    assert torch.equal(converted, tensors["a"].double())
    assert joined.untyped_storage().nbytes() == joined.nbytes
    joined.zero_()  # the page is copied, and the file is as it was
    assert not alone.any()
    with open_tensors(path, mapped=True) as weights:
        assert torch.equal(weights.map(["a"]), tensors["a"])
        write_tensors(other, {"a": torch.zeros(3, 5)})
        other.replace(path)  # the old file lives on
        assert torch.equal(weights.map(["a"]), tensors["a"])
        weights.read("a", torch.empty(3, 5))
        assert torch.equal(weights.map(["a"]), tensors["a"])


def test_what_does_not_lie_at_a_multiple_of_its_size_is_read(tmp_path):
    header = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    assert (8 + len(header)) % 4
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<2f", 1, 2))
    with open_tensors(tmp_path / "x.safetensors", mapped=True) as weights:
        assert weights.map(["a"]) is None
        assert torch.equal(weights.read("a"), torch.tensor([1.0, 2.0]))


def test_shards_are_one_checkpoint(tmp_path):
    names = list(malformed.SHAPES)
    parts = {"a.safetensors": names[:7], "b.safetensors": names[7:]}
    for file, part in parts.items():
        (tmp_path / file).write_bytes(malformed.safetensors(part))
    places = {name: file for file, part in parts.items() for name in part}
    (tmp_path / safetensors.INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    with open_shards(tmp_path) as weights:
        assert weights.entries().keys() == set(names)
        for name in names:
            np.testing.assert_array_equal(weights.read(name).numpy(), malformed.values(name))


def packed(path, kind, rows=5, columns=768):
    """A file of one packed weight; returns its values."""
    kind = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(0).integers(0, 256, (rows, columns // block, size), np.uint8)
    raw[..., [1, 3, -1]] &= 0x3B  # the scales, wherever they are, finite
    raw = raw.reshape(rows, -1)
    info = malformed.string("x") + struct.pack("<I2QIQ", 2, columns, rows, kind, 0)
    head = b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + info
    path.write_bytes(head + bytes(-len(head) % 32) + raw.tobytes())
    return torch.from_numpy(gguf.quants.dequantize(raw, kind))


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_are_widened_as_the_gguf_package_does(tmp_path, kind):
    expected = packed(tmp_path / "m.gguf", kind)
    with open_gguf(tmp_path / "m.gguf") as weights:
        assert weights.entries() == {"x": (torch.float32, (5, 768))}
        torch.testing.assert_close(weights.read("x"), expected, rtol=0, atol=0, equal_nan=True)
        half = weights.read("x", torch.empty(5, 768, dtype=torch.bfloat16))
        torch.testing.assert_close(half, expected.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_packed_weights_need_the_package(tmp_path, monkeypatch):
    packed(tmp_path / "m.gguf", "Q4_K")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="packed as Q4_K, which need the package gguf"):
        open_gguf(tmp_path / "m.gguf")


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm", "bert-bge"])
def test_vocabularies_without_weights_are_read(shared_data, name):
    with open_gguf(shared_data / "tokenizers" / f"ggml-vocab-{name}.gguf") as weights:
        assert weights.entries() == {} and len(weights.metadata["tokenizer.ggml.tokens"]) > 30_000


def test_the_slowed_positions_of_llama_3_become_the_setting_they_came_from(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    metadata = malformed.METADATA | {"llama.rope.freq_base": 1e8}
    plain, _ = rope_frequencies(1e8, 4, None)
    slowed, _ = rope_frequencies(1e8, 4, scaling)
    for factors, right in ((plain / slowed, True), (plain / slowed * 1.1, False), (torch.ones(3), False)):
        (tmp_path / "m.gguf").write_bytes(malformed.gguf(metadata, more={"rope_freqs.weight": factors.numpy()}))
        with open_gguf(tmp_path / "m.gguf") as weights:
            assert "rope_freqs.weight" not in weights.entries()
            if right:
                assert weights.config["rope_scaling"] == pytest.approx(scaling)
            else:
                with pytest.raises(CheckpointError, match="must slow rotary positions as Llama 3 does"):
                    _ = weights.config
