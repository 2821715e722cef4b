"""Packed GGUF weights that stay packed: the very values that the package gguf widens them to."""

import gguf
import numpy as np
import pytest
import torch

import pyllm
from pyllm import _C, ops
from pyllm.checkpoint import CheckpointError
from pyllm.checkpoint.gguf_packed import KINDS, Layout, unpacked
from pyllm.engine import describe

SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q5_K": [0, 2],
          "Q6_K": [208]}  # fmt: skip


def blocks(kind, rows, k, generator):
    """Random blocks of a kind, uint8 (rows, blocks, bytes), and what they are in float32."""
    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = torch.randint(0, 256, (rows, k // values, size), dtype=torch.uint8, generator=generator)
    for at in SCALES[kind]:
        scales = torch.randn(rows, k // values, 1, generator=generator) * 2**-6
        raw[..., at : at + 2] = scales.half().view(torch.uint8)
    wide = gguf.quants.dequantize(raw.numpy().reshape(rows, -1), gguf.GGMLQuantizationType[kind])
    return raw, torch.from_numpy(wide).view(rows, k)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_same_values_in_every_layout_that_holds_it(kind, isa):
    raw, wide = blocks(kind, 9, 512, torch.Generator().manual_seed(1))
    own = KINDS[kind]
    for wanted in (own, Layout(8, 16, False, own.has_minimums), Layout(8, 16, False, True)):
        weight = unpacked(kind, raw, wanted, None)
        assert (weight.bits, weight.group, weight.minimums is not None) == (wanted[0], wanted[1], wanted[3])
        assert torch.equal(weight.dequantize(), wide)
        assert torch.equal(ops.pack_quantized(weight).unpack().dequantize(), wide)


def test_a_minimum_beyond_a_half_is_not_finite(isa):
    raw = torch.zeros(1, 1, 18, dtype=torch.uint8)
    raw[..., :2] = torch.tensor([9000.0]).half().view(torch.uint8)
    assert unpacked("Q4_0", raw, KINDS["Q4_0"], None).dequantize().eq(-8 * 9000).all()
    assert unpacked("Q4_0", raw, Layout(4, 32, False, True), None).dequantize().eq(-8 * 9000).all()
    with pytest.raises(ValueError, match="Q4_0 must have scales that are finite"):
        unpacked("Q4_0", raw, Layout(4, 32, True, True), None)


def test_unpacking_refuses_what_does_not_fit():
    raw, _ = blocks("Q4_1", 3, 64, torch.Generator().manual_seed(1))

    def unpack(
        kind="Q4_1", raw=raw, values=(3, 64), scales=(3, 2), dtype=torch.float16, minimums=True, bits=8, group=32
    ):
        scales = torch.empty(scales, dtype=dtype)
        return _C.unpack_blocks(kind, raw, torch.empty(values, dtype=torch.uint8), scales,
                                torch.empty_like(scales) if minimums else None, bits, group)  # fmt: skip

    assert unpack() and unpack(values=(3, 32), bits=4) and unpack(scales=(3, 4), group=16, dtype=torch.float32)
    for wrong, message in (
        ({"kind": "Q9_1"}, "kind must be Q4_0, .* but got Q9_1"),
        ({"raw": raw[:, :, 1:].contiguous()}, r"raw must have shape \(3, 2, 20\), but got \(3, 2, 19\)"),
        ({"raw": raw[:, ::2]}, "raw must be contiguous"),
        ({"values": (3, 32)}, r"values must have shape \(3, 64\)"),
        ({"scales": (2, 2)}, r"scales must have shape \(3, 2\)"),
        ({"dtype": torch.bfloat16}, "scales must be float32, but got bfloat16"),
        ({"minimums": False}, "minimums must be given for Q4_1, but got none"),
        ({"bits": 5}, "bits must be 8 or 4, but got 5"),
        ({"group": 8}, "groups must be of 32 values or, of 8 bits, of 16, but got 8"),
        ({"kind": "Q5_1", "bits": 4}, "bits must be 8, but got 4"),
    ):
        with pytest.raises((TypeError, ValueError), match=rf"\[unpack_blocks\] {message}"):
            unpack(**wrong)


MIXED = ["Q4_K", "Q6_K", "Q8_0", "Q4_0", "Q4_1", "Q5_K", "Q5_0", "Q5_1"]


def written(path, kinds, spoil=None):
    """A Llama of two layers whose matrices are packed, each as the next of the kinds (or not, for None)."""
    generator, hidden, vocabulary = torch.Generator().manual_seed(2), 256, 40
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"block_count": 2, "embedding_length": hidden, "feed_forward_length": 512, "context_length": 64,
                       "attention.head_count": 4, "attention.head_count_kv": 2}.items():  # fmt: skip
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    shapes = {"token_embd": (vocabulary, hidden)}
    for i in range(2):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in {
            "attn_q": (hidden, hidden), "attn_k": (128, hidden), "attn_v": (128, hidden),
            "attn_output": (hidden, hidden), "ffn_gate": (512, hidden), "ffn_up": (512, hidden),
            "ffn_down": (hidden, 512)}.items()}  # fmt: skip
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(hidden, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    for i, (name, (rows, k)) in enumerate(shapes.items()):
        kind = kinds[i % len(kinds)]
        if kind is None:
            writer.add_tensor(f"{name}.weight", torch.randn(rows, k, generator=generator).numpy() * 0.05)
            continue
        raw, _ = blocks(kind, rows, k, generator)
        if spoil is not None and name == "blk.1.attn_v":
            at = SCALES[kind][-1]
            raw[5, 0, at : at + 2] = torch.tensor([spoil]).half().view(torch.uint8)
        writer.add_tensor(f"{name}.weight", raw.numpy().reshape(rows, -1),
                          raw_dtype=gguf.GGMLQuantizationType[kind])  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("kinds", [["Q4_K"], ["Q4_K", "Q6_K"], MIXED, ["Q8_0", None, "Q4_0"]], ids=str)
def test_a_model_keeps_what_it_can_as_it_is(kinds, tmp_path):
    path = written(tmp_path / "m.gguf", kinds)
    model, _ = pyllm.load(path)
    wide, _ = pyllm.load(path, dtype=torch.float32)
    assert not wide.quantized_weights() and model.num_parameters() == wide.num_parameters()
    packed = {n: m.packed for n, m in model.named_modules() if getattr(m, "packed", None) is not None}
    assert packed["embedding"] is packed["head"]
    assert len(packed) == 10 or None in kinds
    for name, weight in wide.named_parameters():
        layer = name.removesuffix(".weight")
        found = packed[layer].unpack().dequantize() if layer in packed else model.get_parameter(name)
        assert torch.equal(found, weight), name
    ids = torch.arange(20)[None]
    with torch.no_grad():
        found, expected = model(ids), wide(ids)
    assert (found - expected).norm() < 0.2 * expected.norm()  # a net of noise, which makes more of it
    assert not pyllm.check(model)
    pyllm.save(model, tmp_path / "ours")
    assert torch.equal(pyllm.load(tmp_path / "ours")[0](ids), found)


def test_formats_are_as_small_as_they_can_be(tmp_path):
    model, _ = pyllm.load(written(tmp_path / "m.gguf", ["Q4_K"]))
    assert {w.format for w in model.quantized_weights()} == {"int4-min"}
    model, _ = pyllm.load(written(tmp_path / "n.gguf", ["Q4_0"]))
    assert {(w.format, w.half_scales) for w in model.quantized_weights()} == {("int4", True)}
    assert describe(tmp_path / "n.gguf")["dtypes"].keys() == {"float32", "int4"}


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
@pytest.mark.parametrize("kinds", [["Q8_0"], ["Q4_K"], ["Q6_K"], ["Q4_1"]], ids=str)
def test_scales_that_are_not_finite_are_refused(kinds, spoil, tmp_path):
    path = written(tmp_path / "m.gguf", kinds, spoil)
    with pytest.raises(CheckpointError, match=rf"blk\.1\.attn_v\.weight.* of {kinds[0]} must have scales"):
        pyllm.load(path)


def test_cut_files_are_refused(tmp_path):
    path = written(tmp_path / "m.gguf", MIXED)
    whole = path.read_bytes()
    for at in (len(whole) - 1, len(whole) - 32, len(whole) // 2, len(whole) // 5, 3000):
        path.write_bytes(whole[:at])
        with pytest.raises(CheckpointError):
            pyllm.load(path)
