"""GGUF files that are written: read back the same by us, and with the same values by the package gguf."""

import gguf
import numpy as np
import pytest
import torch

import pyllm
from pyllm.checkpoint import CheckpointError, saving
from pyllm.checkpoint.architectures import ARCHITECTURES
from pyllm.checkpoint.gguf import open_gguf
from pyllm.families import FAMILIES
from pyllm.text import Tokenizer

SIZES = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip
SHARED = SIZES | {"num_key_value_heads": 2}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192, "rope_theta": 5e5}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
GEMMA = SHARED | {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 9}
CASES = {
    "llama": ("llama", SHARED),
    "llama, all biases": ("llama", SIZES | {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama, llama3, tied": ("llama", SHARED | {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama, linear": ("llama", SHARED | {"rope_scaling": {"type": "linear", "factor": 3.0}}),
    "mistral": ("mistral", SHARED | {"sliding_window": 7}),
    "mixtral": ("mixtral", SHARED | {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", SHARED | {"rope_parameters": YARN}),
    "qwen3": ("qwen3", SHARED | {"head_dim": 12}),
    "qwen3_moe": (
        "qwen3_moe",
        SHARED | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA | {"sliding_window_pattern": 2, "rope_theta": 5e4, "rope_local_base_freq": 500.0}),
    "phi3": ("phi3", SHARED | {"sliding_window": 9, "partial_rotary_factor": 0.5}),
    "gpt2": ("gpt2", {"vocab_size": 300, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}),
    "gpt_neox": ("gpt_neox", SIZES | {"rotary_pct": 0.5, "use_parallel_residual": False}),
    "bloom": ("bloom", {"vocab_size": 300, "hidden_size": 32, "n_layer": 3, "n_head": 4, "seq_length": 64}),
}
TEXT = "Der Fluß, die Straße: überall läuft Wasser, und überall läuft es bergab. " * 9 + "1234567890 ?!;"


def decoder(case):
    """A small model of a family, whose norms and biases are random too."""
    family, config = CASES[case]
    model = FAMILIES[family].model(**FAMILIES[family].config(config)).eval()
    model.family = family
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.fixture(scope="module")
def tokenizer():
    trained = Tokenizer.train("bpe:290", TEXT)
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return pickled(trained, bos_id=trained.eos_id, add_bos=True, chat_template=template)


def pickled(tokenizer, **changes):
    """A tokenizer with other arguments."""
    make, (contents, arguments) = tokenizer.__reduce__()
    return make(contents, arguments | changes)


@pytest.mark.parametrize("case", CASES)
def test_every_architecture_comes_back_and_is_read_by_the_gguf_package(tmp_path, case, tokenizer):
    model = decoder(case)
    pyllm.export(model, tmp_path / "m.gguf", tokenizer, gguf=True)
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]
    again, its = pyllm.load(tmp_path / "m.gguf")
    assert again.family == model.family and its.encode(TEXT) == tokenizer.encode(TEXT)
    ids = torch.arange(40)[None]
    exact = not case.startswith("gemma")  # whose norms are kept as 1 + weight
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0 if exact else 1e-4)

    theirs = gguf.GGUFReader(tmp_path / "m.gguf")
    with open_gguf(tmp_path / "m.gguf") as ours:
        name = ours.architecture.model_type
        metadata = ours.metadata
        entries = ours.entries()
        arch = next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
        known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[arch]}
        seen = 0
        for tensor in theirs.tensors:
            pattern = tensor.name.rpartition(".")[0]
            pattern = f"blk.{{bid}}.{pattern.split('.')[2]}" if pattern.startswith("blk.") else pattern
            assert pattern in known, f"{tensor.name} is none of {name}'s"
            if tensor.name in entries and not (".attn_q." in tensor.name or ".attn_k." in tensor.name):
                change = 1.0 if not exact and tensor.name.endswith("norm.weight") else 0.0
                np.testing.assert_allclose(tensor.data - change, ours.read(tensor.name).numpy(), rtol=0, atol=1e-7)
                seen += 1
            elif "_exps" in tensor.name:
                each = [ours.read(tensor.name.replace("_exps.", f".{e}.")).numpy() for e in range(5)]
                np.testing.assert_array_equal(tensor.data, np.stack(each))
        assert seen > 8
    fields = {field: theirs.get_field(field).contents() for field in theirs.fields if not field.startswith("GGUF.")}
    assert fields.keys() == metadata.keys()
    for field, value in fields.items():
        assert value == (metadata[field].tolist() if isinstance(metadata[field], np.ndarray) else metadata[field])
    assert fields["tokenizer.ggml.tokens"][290:] == [f"[PAD{i}]" for i in range(290, 300)]


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("case", ["mixtral", "gemma2"])
def test_matrices_are_written_in_the_dtype_that_is_asked_for(tmp_path, case, stored, dtype):
    model = decoder(case).to(stored)
    pyllm.export(model, tmp_path / "m.gguf", gguf=True, dtype=dtype)
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    expected = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[dtype or stored]
    assert kinds == {"F32", expected}
    again, _ = pyllm.load(tmp_path / "m.gguf", dtype=dtype or stored)
    for name, parameter in model.named_parameters():
        found = dict(again.named_parameters())[name]
        torch.testing.assert_close(found, parameter.to(found.dtype), rtol=0, atol=2**-22 if parameter.dim() == 1 else 0)


def test_what_hugging_face_says_and_gguf_says_are_the_same_model(tmp_path):
    model = decoder("llama, llama3, tied")
    pyllm.export(model, tmp_path / "m.gguf", gguf=True)
    again, _ = pyllm.load(tmp_path / "m.gguf")
    pyllm.export(again, tmp_path / "folder")
    assert pyllm.load(tmp_path / "folder")[0].config == again.config


@pytest.mark.parametrize("name", ["gpt-2", "llama-spm"])
def test_vocabularies_of_others_come_back(tmp_path, shared_data, name):
    with open_gguf(shared_data / "tokenizers" / f"ggml-vocab-{name}.gguf") as vocabulary:
        tokenizer = Tokenizer.from_gguf_metadata(vocabulary.metadata)
    model = pyllm.Decoder(len(tokenizer), 8, 1, 1)
    pyllm.export(model, tmp_path / "m.gguf", tokenizer, gguf=True, verify=False)
    its = pyllm.load(tmp_path / "m.gguf")[1]
    text = (shared_data / "tokenizers" / f"ggml-vocab-{name}.gguf.inp").read_text(encoding="utf-8")
    cases = text.split("\n__ggml_vocab_test__\n")
    assert its.encode_batch(cases) == tokenizer.encode_batch(cases) and len(cases) > 30
    with open_gguf(tmp_path / "m.gguf") as ours:
        types = np.asarray(vocabulary.metadata["tokenizer.ggml.token_type"])
        assert np.array_equal(ours.metadata["tokenizer.ggml.token_type"], types)


def test_a_tokenizer_of_scored_pieces_comes_back(tmp_path, shared_data):
    model, tokenizer = pyllm.load(shared_data / "stories260K" / "hf")
    pyllm.export(model, tmp_path / "m.gguf", tokenizer, gguf=True, dtype=torch.float16)
    recorded = shared_data / "stories260K" / "gguf" / "stories260K-f16.gguf"
    with open_gguf(recorded) as theirs, open_gguf(tmp_path / "m.gguf") as ours:
        for key in ("tokens", "token_type", "bos_token_id", "eos_token_id", "unknown_token_id", "add_bos_token"):
            key = f"tokenizer.ggml.{key}"
            np.testing.assert_array_equal(ours.metadata[key], theirs.metadata[key])
        assert theirs.entries().keys() - ours.entries().keys() == {"output.weight"}, "which is the embedding"
        for name, entry in ours.entries().items():
            assert entry == theirs.entries()[name] and torch.equal(ours.read(name), theirs.read(name))


def test_what_gguf_has_no_place_for_is_an_error(tmp_path, tokenizer, monkeypatch):
    def refused(model, *arguments, **options):
        with pytest.raises(ValueError, match=r"\[export\]") as error:
            pyllm.export(model, tmp_path / "m.gguf", *arguments, gguf=True, **options)
        assert not list(tmp_path.iterdir())
        return str(error.value)

    windowed = pyllm.Decoder(300, 16, 2, 2, window=8, qkv_bias=True)
    windowed.family = "qwen2"
    assert "qwen2 has no window 8" in refused(windowed)
    assert "none is made for LanguageModel" in refused(pyllm.LanguageModel(300, 8))
    model = pyllm.Decoder(300, 16, 2, 2)
    model.family = "bert"
    assert "none is made for bert" in refused(model)
    model.family = None
    assert "model 280" in refused(pyllm.Decoder(280, 16, 2, 2), tokenizer)
    assert "does not spell spaces" in refused(model, pickled(Tokenizer.train("char", TEXT)))
    assert "dtype must be one of" in refused(model, dtype=torch.float64)
    (tmp_path / "m.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match="must be a new file"):
        pyllm.export(model, tmp_path / "m.gguf", gguf=True)


def test_what_does_not_come_back_the_same_is_removed(tmp_path, tokenizer, monkeypatch):
    model = decoder("llama")

    def fails(match, gguf):
        with pytest.raises(CheckpointError, match=match):
            pyllm.export(model, tmp_path / "m", tokenizer, gguf=gguf)
        assert not list(tmp_path.iterdir())

    write = saving.export_weights
    monkeypatch.setattr(saving, "export_weights", lambda *a: ((n, t + 1e-3) for n, t in write(*a)))
    fails("the weights does not", False)
    monkeypatch.setattr(saving, "export_weights", write)
    made = saving.tokenizer_metadata
    for key, value, match in (
        ("tokenizer.ggml.merges", ["a b"], "the ids of"),
        ("tokenizer.ggml.add_bos_token", False, "BOS"),
        ("tokenizer.chat_template", "{{ messages[0].content }}", "the chat template"),
    ):
        monkeypatch.setattr(saving, "tokenizer_metadata", lambda *a, k=key, v=value: made(*a) | {k: v})
        fails(match, True)


def test_every_architecture_is_tested():
    families = {family for family, _ in CASES.values()}
    assert families == {family for table in ARCHITECTURES.values() for family in table.families}
