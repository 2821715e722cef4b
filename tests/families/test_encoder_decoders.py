"""T5, BART and Marian against transformers: a small random model saved there, loaded here, and saved back."""

import json
from types import SimpleNamespace

import pytest
import tokenizers
import torch
import transformers
from families.parity import (
    check_agrees,
    check_leaves_out_the_same,
    difference,
    gradients_under_their_names,
    loaded_there,
    made,
)
from safetensors.torch import load_file, save_file

import pyllm
from pyllm.checkpoint import CheckpointError
from pyllm.engine import SamplingParams, generate_ids
from pyllm.families import FAMILIES
from pyllm.models import Pair

T5 = {"vocab_size": 61, "d_model": 32, "d_kv": 6, "d_ff": 40, "num_layers": 3, "num_decoder_layers": 2, "num_heads": 4,
      "relative_attention_num_buckets": 8, "relative_attention_max_distance": 20, "pad_token_id": 0, "eos_token_id": 1,
      "decoder_start_token_id": 0}  # fmt: skip
BART = {"vocab_size": 61, "d_model": 32, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 40, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
        "init_std": 0.2, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2,
        "forced_eos_token_id": 2}  # fmt: skip
MARIAN = BART | {"pad_token_id": 60, "eos_token_id": 0, "decoder_start_token_id": 60, "forced_eos_token_id": 0}

CASES = {
    "t5": ("t5", T5),
    "t5, gated, untied": ("t5", T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "t5, gated, tied": ("t5", T5 | {"feed_forward_proj": "gated-silu", "tie_word_embeddings": False}),
    "bart": ("bart", BART),
    "marian": ("marian", MARIAN | {"scale_embedding": True, "activation_function": "swish", "init_std": 0.1,
                                   "attention_dropout": 0.3, "activation_dropout": 0.2}),
}  # fmt: skip
NEVER = {"marian": {"bad_words_ids": [[60]]}}  # all of Marian's own checkpoints say so of their padding


def make(case, folder):
    model_type, settings = CASES[case]
    theirs = made(transformers.AutoModelForSeq2SeqLM, model_type, settings, folder)
    *_, last = (p for name, p in theirs.get_decoder().named_parameters() if "final_layer_norm.weight" in name)
    with torch.no_grad():
        last.normal_()  # otherwise most answers repeat their first id
        if model_type != "t5":
            theirs.final_logits_bias.normal_(std=0.3)
        elif "untied" in case:
            theirs.lm_head.weight = torch.nn.Parameter(torch.randn_like(theirs.lm_head.weight))
    theirs.save_pretrained(folder)
    return theirs


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    theirs = make(request.param, folder)
    ours, _ = pyllm.load(folder)
    return SimpleNamespace(case=request.param, theirs=theirs, ours=ours, family=FAMILIES[ours.family], folder=folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {kind: tmp_path_factory.mktemp(kind) for kind in ("t5", "bart", "marian")}
    for kind, folder in found.items():
        make(kind, folder)
    return found


def batch(sources=(23, 9, 16), targets=14):
    """Sources padded on the right, their mask and lengths, and targets."""
    lengths = torch.tensor(sources)
    mask = (torch.arange(max(sources)) < lengths[:, None]).long()
    return torch.randint(3, 59, mask.shape) * mask, mask, lengths, torch.randint(3, 59, (len(sources), targets))


def logits_of(theirs, source, mask, ids):
    return theirs(input_ids=source, attention_mask=mask, decoder_input_ids=ids).logits


@torch.no_grad()
def test_logits_agree(pair):
    source, mask, lengths, ids = batch((40, 23, 40, 17) * 4, 30)
    eager = logits_of(pair.theirs, source, mask, ids)
    sdpa = loaded_there(type(pair.theirs), pair.folder, attention="sdpa")
    check_agrees(pair.case, pair.ours(Pair(source, ids, lengths)), eager, logits_of(sdpa, source, mask, ids))


def test_gradients_agree(pair):
    source, mask, lengths, targets = batch()
    targets[0, 9:] = -100
    pair.theirs(input_ids=source, attention_mask=mask, labels=targets).loss.backward()
    pair.ours.loss(pair.ours.pair(source, targets, lengths), targets).backward()
    found = gradients_under_their_names(pair.ours, pair.family)
    names = [name for name, parameter in pair.theirs.named_parameters() if parameter.grad is not None]
    assert len(names) >= 50 and (pair.family.model_type != "t5" or sum("relative" in name for name in names) == 2)
    for name in names:
        gradient = pair.theirs.get_parameter(name).grad
        if name == "model.shared.weight":  # there what is looked up for padding, and to begin with, is not trained
            found[name][pair.ours.config["pad_id"]] = gradient[pair.ours.config["pad_id"]]
        least = 1e-6 if name.endswith("k_proj.bias") else 1e-8  # which does not change what softmax gives
        assert difference(found[name], gradient) <= 2e-5 * gradient.abs().max().item() + least, name
    pair.theirs.zero_grad()
    pair.ours.zero_grad()


def test_training_drops_the_same(pair):
    source, mask, lengths, ids = batch()
    check_leaves_out_the_same(pair.ours, pair.theirs, lambda: pair.ours(Pair(source, ids, lengths)),
                              lambda: logits_of(pair.theirs, source, mask, ids))  # fmt: skip


def test_layers_that_training_would_leave_out_are_warned_of():
    for name in ("encoder_layerdrop", "decoder_layerdrop"):
        with pytest.warns(UserWarning, match=f"{name} is 0.1, but no layers are left out"):
            FAMILIES["bart"].config(BART | {name: 0.1})


@torch.no_grad()
def test_greedy_generation_is_the_same(pair):
    source, mask, lengths, _ = batch()
    prompts = [row[:n].tolist() for row, n in zip(source, lengths, strict=True)]
    options = {"attention_mask": mask, "max_new_tokens": 16, "do_sample": False} | NEVER.get(pair.case, {})
    forced = type(pair.ours)(**pair.ours.config | {"forced_bos_id": 5}).eval()
    forced.load_state_dict(pair.ours.state_dict())

    def same(ours, theirs, stop_ids):
        steps = generate_ids(ours, prompts, SamplingParams(temperature=0), max_tokens=16, stop_ids=stop_ids)
        answers = [[i for i in ids if i is not None] for ids in zip(*steps, strict=True)]
        for row, ids in zip(theirs.tolist(), answers, strict=True):
            assert row[1 : len(ids) + 1] == ids and (len(ids) == 16 or ids[-1] in stop_ids)
        return answers

    stop = same(pair.ours, pair.theirs.generate(source, **options), [])[0][3]
    answers = same(pair.ours, pair.theirs.generate(source, **options, eos_token_id=stop), [stop])
    assert len(answers[0]) <= 4
    same(forced, pair.theirs.generate(source, **options, forced_bos_token_id=5), [])


@torch.no_grad()
def test_what_is_exported_loads_there_with_equal_logits(pair, tmp_path):
    pyllm.export(pair.ours, tmp_path / "exported")
    again = loaded_there(type(pair.theirs), tmp_path / "exported")
    source, mask, lengths, ids = batch()
    assert torch.equal(logits_of(again, source, mask, ids), logits_of(pair.theirs, source, mask, ids))
    ours, _ = pyllm.load(tmp_path / "exported")
    assert ours.config == pair.ours.config
    assert torch.equal(ours(Pair(source, ids, lengths)), pair.ours(Pair(source, ids, lengths)))
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    expected = pair.theirs.generate(source, **options, **NEVER.get(pair.case, {}))
    assert torch.equal(again.generate(source, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("case", ["t5", "bart"])
def test_texts_are_framed_answered_and_exported_as_there(case, folders, tmp_path):
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(folders[case]).eval()
    words = ["<s>", "<pad>", "</s>"] if case == "bart" else ["<pad>", "</s>", "<s>"]
    words += [f"w{i}" for i in range(61 - len(words))]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, words[-1]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    frame, ends = ("<s> $A </s>" if case == "bart" else "$A </s>"), [(w, words.index(w)) for w in ("<s>", "</s>")]
    backend.post_processor = tokenizers.processors.TemplateProcessing(frame, special_tokens=ends)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>" if case == "bart" else None
    )
    folder = tmp_path / "theirs"
    if case == "bart":
        theirs.generation_config.forced_bos_token_id = 0
    theirs.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    ours, its = pyllm.load(folder)
    pyllm.export(ours, tmp_path / "exported", its)
    again = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "exported").eval()
    texts, options = ["w7 w8 w9 w10", "w20 w21"], {"max_new_tokens": 10, "do_sample": False}
    for text in texts:
        ids = tokenizer(text, return_tensors="pt").input_ids
        expected = theirs.generate(ids, **options)
        assert torch.equal(again.generate(ids, **options), expected) and (case == "t5" or expected[0, 1] == 0)
        answer = tokenizer.decode(expected[0], skip_special_tokens=True)
        assert answer and pyllm.generate(ours, its, text, max_tokens=10, temperature=0) == answer
    assert pyllm.generate(ours, its, texts, max_tokens=10, temperature=0)[1] == answer


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_steps_and_padding_give_the_same_bits(pair, dtype):
    ours, _ = pyllm.load(pair.folder, dtype=dtype)
    source, _, lengths, ids = batch()
    whole = ours(Pair(source, ids, lengths))
    for chunks in ([3, 1, 10], [1] * 14):
        state = ours.new_state(3, 14, ours.encode(source, lengths))
        assert torch.equal(torch.cat([ours(part, state) for part in ids.split(chunks, 1)], 1), whole)
    for n in range(3):
        assert torch.equal(ours(Pair(source[n : n + 1, : lengths[n]], ids[n : n + 1]))[0], whole[n])
    left = torch.stack([row.roll(23 - n) for row, n in zip(source, lengths.tolist(), strict=True)])
    mask = (torch.arange(23) >= 23 - lengths[:, None]).long()
    assert torch.equal(ours(Pair(left, ids), attention_mask=mask), whole)
    if pair.family.model_type == "t5" and dtype == torch.float32:  # the others count positions over padding there
        theirs = logits_of(pair.theirs, left, mask, ids)
        assert difference(whole, theirs) <= 1e-5 * theirs.abs().max().item()


@torch.no_grad()
def test_names_that_other_checkpoints_have(pair, tmp_path):
    weights = load_file(pair.folder / "model.safetensors")
    prefix = "" if pair.family.model_type == "t5" else "model."
    shared = weights.pop(f"{prefix}shared.weight")
    for side in ("encoder", "decoder"):
        weights[f"{prefix}{side}.embed_tokens.weight"] = shared.clone()
    ignored = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    weights |= {ignored: torch.ones(8, 4)} if prefix == "" else {}
    if pair.family.model_type == "marian":
        weights["model.encoder.embed_positions.weight"] = torch.ones(64, 32)
    if prefix:
        bias = weights.pop("final_logits_bias")
    (tmp_path / "config.json").write_text((pair.folder / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors")
    ours, _ = pyllm.load(tmp_path)
    source, _, lengths, ids = batch()
    expected = pair.ours(Pair(source, ids, lengths))
    found = ours(Pair(source, ids, lengths))
    torch.testing.assert_close(found, expected - bias if prefix else expected)
    if prefix:  # the bare model
        bare = {name.removeprefix(prefix): w for name, w in weights.items()}
        save_file(bare, tmp_path / "model.safetensors")
        assert torch.equal(pyllm.load(tmp_path)[0](Pair(source, ids, lengths)), found)


@pytest.mark.parametrize(
    ("model_type", "setting", "message"),
    [
        ("t5", {"d_kv": 0}, "d_kv must be a whole number"),
        ("t5", {"feed_forward_proj": "gated-tanh"}, "feed_forward_proj must be one of relu"),
        ("t5", {"relative_attention_max_distance": 10**9}, "at most 65536"),
        ("t5", {"relative_attention_num_buckets": 2}, "num_buckets must be 4 or more"),
        ("t5", {"decoder_start_token_id": 61}, "decoder_start_token_id must be the id of a token, from 0 to 60"),
        ("t5", {"layer_norm_epsilon": "1"}, "layer_norm_epsilon must be a number"),
        ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder must be True"),
        ("bart", {"encoder_layers": 10**9}, "encoder_layers must be in"),
        ("bart", {"encoder_attention_heads": 5}, "multiple of num_heads"),
        ("bart", {"normalize_before": True}, "normalize_before must be False"),
        ("bart", {"tie_word_embeddings": False}, "tie_word_embeddings must be True"),
        ("bart", {"pad_token_id": -1}, "pad_token_id must be the id of a token"),
        ("bart", {"max_position_embeddings": 65}, "model.encoder.embed_positions.weight must be"),
        ("bart", {"auto_map": {"AutoModel": "modeling.Mine"}}, "asks to run code of its own"),
        ("marian", {"decoder_vocab_size": 60}, "decoder_vocab_size must be 61"),
        ("marian", {"share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings must be True"),
        ("marian", {"activation_function": "tanh"}, "activation_function must be one of gelu"),
    ],
)
def test_configs_that_are_refused(model_type, setting, message, folders, tmp_path):
    config = json.loads((folders[model_type] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | setting))
    (tmp_path / "model.safetensors").symlink_to(folders[model_type] / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        pyllm.load(tmp_path)


@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_beams_are_those_of_transformers(pair, early_stopping):
    engine, end = pyllm.Engine(pair.ours, max_sequences=4, max_length=60), pair.theirs.config.eos_token_id
    for seed, max_tokens in ((0, 3), (1, 12), (2, 25)):
        torch.manual_seed(seed)
        source = [*torch.randint(3, 60, (seed + 2,)).tolist(), end]
        options = {"early_stopping": early_stopping, "length_penalty": 1.0 - seed}
        expected = pair.theirs.generate(torch.tensor([source]), num_beams=4, num_return_sequences=4, do_sample=False,
                                        max_new_tokens=max_tokens, output_scores=True, return_dict_in_generate=True,
                                        **options, **NEVER.get(pair.ours.family, {}))  # fmt: skip
        found = engine.beam_search(source, 4, max_tokens=max_tokens, **options)
        for beam, row in zip(found, expected.sequences[:, 1:].tolist(), strict=True):
            assert beam.ids == row[: row.index(end) + 1 if end in row else max_tokens]
        torch.testing.assert_close(
            torch.tensor([b.score for b in found]), expected.sequences_scores, atol=1e-4, rtol=1e-5
        )
    assert engine.pool.pages.available == engine.pool.pages.count
