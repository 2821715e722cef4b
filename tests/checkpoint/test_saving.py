"""The folders that `pyllm.export` writes are loaded by transformers and by us, and hold the same model."""

import json
import os

import numpy as np
import pytest
import torch

import pyllm
from pyllm.checkpoint import saving
from pyllm.engine import generate_ids

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "intermediate_size": 24}


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_transformers_loads_what_was_loaded_and_saved(shared_data, tmp_path):
    import transformers

    stories = shared_data / "stories260K"
    model, tokenizer = pyllm.load(stories / "gguf" / "stories260K-f32.gguf")
    pyllm.export(model, tmp_path / "saved", tokenizer)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = torch.from_numpy(np.load(stories / "expected_token_ids_n200.npy")[:32].astype(np.int64))[None]
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), rtol=0, atol=2e-5)
    its = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    text = "Once upon a time, there was a little girl named Lily."
    again, our_tokenizer = pyllm.load(tmp_path / "saved")
    assert its(text).input_ids == tokenizer.encode(text) == our_tokenizer.encode(text)
    assert our_tokenizer.eos_ids == tokenizer.eos_ids and our_tokenizer.bos_id == tokenizer.bos_id
    assert same(again, model)


@pytest.mark.parametrize("family", [None, "mistral"])
@pytest.mark.parametrize("shard", [5 << 30, 5000])
def test_a_model_of_our_own_comes_back_whole_and_in_shards(tmp_path, monkeypatch, shard, family):
    monkeypatch.setattr(saving, "_SHARD", shard)
    model = pyllm.Decoder(**SMALL, num_kv_heads=2, dropout=0.1).bfloat16()
    model.family = family
    (tmp_path / "empty").mkdir()
    pyllm.export(model, tmp_path / "empty")
    again, tokenizer = pyllm.load(tmp_path / "empty")
    assert tokenizer is None and same(again, model) and again.family == (family or "llama")
    assert (len(list((tmp_path / "empty").glob("*.safetensors"))) > 1) == (shard == 5000)


@pytest.mark.parametrize("kind", [pyllm.Decoder, pyllm.EncoderDecoder])
@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
def test_what_generating_does_not_do_is_said_and_kept(kind, where, tmp_path):
    model = kind(**SMALL, attention_scale=1.0, eos_ids=[3]) if kind.answers else kind(**SMALL)
    pyllm.export(model, tmp_path / "plain")
    assert not (tmp_path / "plain" / "generation_config.json").exists()
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    asked = {"num_beams": 4, "no_repeat_ngram_size": 3, "min_length": 0, "bad_words_ids": [[7]], "temperature": 0.5}
    started = {"decoder_start_token_id": 0} if kind.answers else {}
    (tmp_path / "plain" / where).write_text(json.dumps((config if where == "config.json" else started) | asked))
    found, _ = pyllm.load(tmp_path / "plain")
    unheeded = {"num_beams": 4, "no_repeat_ngram_size": 3, "bad_words_ids": [[7]]}
    assert found.unheeded == unheeded
    with pytest.warns(UserWarning, match=r"asks for num_beams=4, no_repeat_ngram_size=3, bad_words_ids=\[\[7\]\] to"):
        next(generate_ids(found, [[5, 6]], max_tokens=1))
    pyllm.export(found, tmp_path / "again")
    assert pyllm.load(tmp_path / "again")[0].unheeded == unheeded
    kept = json.loads((tmp_path / "again" / "generation_config.json").read_text())
    assert kept == unheeded | ({"pad_token_id": 0, "eos_token_id": 3, "decoder_start_token_id": 0} if kind.answers
                               else {})  # fmt: skip


def test_what_is_there_stays(tmp_path):
    model = pyllm.Decoder(**SMALL)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_text("mine")
    for path in (tmp_path / "x", tmp_path / "x" / "file"):
        with pytest.raises(FileExistsError, match="must be a new or an empty folder"):
            pyllm.export(model, path)
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "file"]


def test_a_stopped_writer_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "seal", lambda path: os.stat(path / "nothing"))
    with pytest.raises(NotADirectoryError):
        pyllm.export(pyllm.Decoder(**SMALL), tmp_path / "x")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("gguf", [False, True])
@pytest.mark.parametrize("stage", ["writing", "verifying"])
def test_ctrl_c_at_any_stage_leaves_nothing(tmp_path, gguf, stage):
    def stop(what, done, total):
        assert 0 < done <= total
        if what == stage:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pyllm.export(pyllm.Decoder(**SMALL), tmp_path / "x", gguf=gguf, progress=stop)
    assert not list(tmp_path.iterdir())


def test_progress_goes_from_writing_to_verifying(tmp_path):
    seen = []
    model = pyllm.Decoder(**SMALL)
    model.save(tmp_path / "x", progress=lambda *step: seen.append(step))
    assert [what for what, _, _ in seen] == sorted((what for what, _, _ in seen), reverse=True)
    assert seen[-1][:2] == ("verifying", seen[-1][2]) and seen[-1][2] == model.num_parameters()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_rounded_to_the_dtype_that_is_asked_for(tmp_path, dtype):
    model = pyllm.Decoder(**SMALL)
    model.save(tmp_path / "x", dtype=dtype)
    again, _ = pyllm.load(tmp_path / "x")
    assert same(again, model.to(dtype))


def test_models_that_are_no_decoders_are_compared_too(tmp_path):
    for i, model in enumerate((pyllm.models.Encoder(50, 16, 1, 2, head="span"), pyllm.models.Encoder(50, 16, 1, 2))):
        model.save(tmp_path / str(i))
        assert same(pyllm.load(tmp_path / str(i))[0], model)


def test_a_model_that_no_config_describes_is_an_error(tmp_path):
    model = pyllm.Decoder(**SMALL, position="rope", post_norms=True, attention_softcap=7.5)
    model.family = "llama"
    with pytest.raises(ValueError, match=r"\[export\] .* llama has no .*attention_softcap 7.5.* pyllm.save keeps"):
        pyllm.export(model, tmp_path / "x")
    with pytest.raises(ValueError, match=r"\[export\] .* none is made for LanguageModel"):
        pyllm.export(pyllm.LanguageModel(50, 8), tmp_path / "y")
    assert not list(tmp_path.iterdir())
