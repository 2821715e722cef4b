"""What is said of checkpoints is so, and loading them holds no more than their weights and a little."""

import struct

import gguf
import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import pyllm
from pyllm.checkpoint import CheckpointError, saving
from pyllm.cli.info import _description
from pyllm.engine import describe

ALLOWED = 3 << 20  # bytes beyond 5 %, for what is held whatever the size: pieces, and what threads have
HIDDEN, INNER, LAYERS, HEADS, VOCAB = 320, 1024, 4, 5, 4000


@pytest.fixture(scope="module")
def model():
    return pyllm.Decoder(VOCAB, HIDDEN, LAYERS, HEADS, intermediate_size=INNER, tie_embeddings=False)  # 33 MB


def sharded(model, path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "_SHARD", 8 << 20)
        pyllm.export(model, path, verify=False)
    assert len(list(path.glob("*.safetensors"))) > 3


def pickled(model, path):
    pyllm.export(model, path, verify=False)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()


def packed(model, path):
    """A GGUF file whose matrices are Q8_0."""
    pyllm.export(model, path.with_suffix(".f32"), gguf=True, verify=False)
    kind = gguf.GGMLQuantizationType.Q8_0
    reader, writer = gguf.GGUFReader(path.with_suffix(".f32")), gguf.GGUFWriter(path, "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, field.contents(), field.types[0])
    for tensor in reader.tensors:
        matrix = len(tensor.shape) == 2
        values = gguf.quants.quantize(tensor.data, kind) if matrix else np.array(tensor.data)
        writer.add_tensor(tensor.name, values, raw_dtype=kind if matrix else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama2c(model, path):
    numbers = model.num_parameters() + 256 * HIDDEN // HEADS  # and the rotations
    header = struct.pack("<7i", HIDDEN, INNER, LAYERS, HEADS, HEADS, -VOCAB, 256)
    path.write_bytes(header + np.zeros(numbers, np.float32).tobytes())


@pytest.mark.parametrize(
    ("write", "stored"), [(sharded, None), (pickled, None), (packed, {"Q8_0": 30, "F32": 9}), (llama2c, None)]
)
def test_loading_holds_the_weights_and_little_more(tmp_path, model, write, stored):
    path = tmp_path / "m.bin"
    write(model, path)
    found = describe(path)
    print(write.__name__, found["disk"], found["memory"], found["peak"])
    assert found["stored"] == stored and found["parameters"] == model.num_parameters()
    if write is packed:  # and stays so
        assert found["disk"] * 0.98 < found["memory"] < found["disk"] * 1.02
    else:
        assert found["memory"] == 4 * model.num_parameters()
    assert 0.95 * found["memory"] <= found["peak"] <= 1.05 * max(found["disk"], found["memory"]) + ALLOWED


def test_a_checkpoint_of_our_own_is_described(tmp_path):
    text = "the cat sat on the mat"
    tokenizer = pyllm.Tokenizer.train("char", text)
    model = pyllm.LanguageModel(tokenizer.vocab_size, 8)
    pyllm.save(model, tmp_path, tokenizer)
    found = describe(tmp_path)
    assert (found["family"], found["model"], found["context"]) == (None, "LanguageModel", None)
    assert found["config"] == model.config and found["dtypes"] == {"float32": model.num_parameters()}
    assert found["tokenizer"]["vocabulary"] == tokenizer.vocab_size
    assert found["tokenizer"]["eos"] == ["<|endoftext|>"] and found["tokenizer"]["bos"] is None
    assert found["unrecorded"] is None


def test_the_step_of_a_mixture_of_experts_is_recorded(tmp_path):
    pyllm.save(pyllm.Decoder(20, 16, 1, 2, num_experts=2), tmp_path)
    assert describe(tmp_path)["unrecorded"] is None


def test_a_quantised_recurrent_model_is_described_and_why_a_step_runs_in_python_is_said(tmp_path):
    model = pyllm.LanguageModel(50, 64, 2, cell="gru")
    model.quantize("int4")
    pyllm.save(model, tmp_path)
    facts = describe(tmp_path)
    weights = 2 * 2 * 3 * 64 * 64
    assert facts["dtypes"] == {"float32": 50 * 64 + 4 * 3 * 64 + 50, "int4": weights, "int8": 50 * 64}
    assert facts["unrecorded"] is None and facts["memory"] == model.num_bytes()
    said = Console(width=200)
    with said.capture() as shown:
        said.print(_description(facts), _description(facts | {"unrecorded": "torch's erf cannot be recorded"}))
    assert shown.get().count("each step") == 1 and "runs in Python: torch's erf cannot be recorded" in shown.get()


def test_what_cannot_be_loaded_is_the_error_that_loading_gives(tmp_path):
    with pytest.raises(FileNotFoundError, match="must be a file, a folder, or owner/name"):
        describe(tmp_path / "nothing")
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes(8))
    with pytest.raises(CheckpointError, match="version 2 or 3"):
        describe(tmp_path / "m.gguf")
