"""Each family against transformers: a small random model saved there, loaded here, and saved back."""

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from families.parity import (
    Reader,
    check_agrees,
    check_leaves_out_the_same,
    difference,
    gradients_under_their_names,
    load,
    loaded_there,
    made,
    save,
)
from safetensors.torch import load_file

import pyllm
from pyllm import ops
from pyllm.checkpoint import CheckpointError
from pyllm.engine import SamplingParams, generate_ids
from pyllm.families import FAMILIES, WeightsError, check_config, load_weights
from pyllm.nn.position import rope_frequencies

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
         "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1,
         "eos_token_id": 2}  # fmt: skip
SHARED = SIZES | {"num_key_value_heads": 2}
THETA = {"rope_theta": 5000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, **THETA}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, **THETA}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.05, 1.3, 2.0],
    "long_factor": [1.1, 1.5, 4.0, 9.0],
    **THETA,
}

GEMMA = SHARED | {"head_dim": 12, "sliding_window": 6, "query_pre_attn_scalar": 9}
BLOOM = {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "initializer_range": 0.2, "seq_length": 64}
GPT2 = {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.2,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip

MOE = SHARED | {"head_dim": 12, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}

CASES = {
    "llama": ("llama", SHARED),
    "llama, all biases, wide heads": ("llama", SIZES | {"attention_bias": True, "mlp_bias": True, "head_dim": 12}),
    "llama, tied": ("llama", SHARED | {"tie_word_embeddings": True, "attention_dropout": 0.3}),
    "llama, linear": ("llama", SHARED | {"rope_parameters": {"rope_type": "linear", "factor": 3.0, **THETA}}),
    "llama, dynamic": ("llama", SHARED | {"rope_parameters": {"rope_type": "dynamic", "factor": 3.0, **THETA}}),
    "llama, llama3": ("llama", SHARED | {"rope_parameters": LLAMA3}),
    "llama, yarn": ("llama", SHARED | {"rope_parameters": YARN}),
    "llama, yarn with mscale": ("llama", SHARED | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.4,
                                                                             "truncate": False}}),
    "mistral": ("mistral", SHARED | {"sliding_window": 7, "attention_dropout": 0.3}),
    "qwen2": ("qwen2", SHARED | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1,
                                 "attention_dropout": 0.3}),
    "qwen3": ("qwen3", SHARED | {"head_dim": 12, "attention_dropout": 0.3}),
    "bloom": ("bloom", BLOOM | {"n_head": 4, "hidden_dropout": 0.2, "attention_dropout": 0.3}),
    "bloom, six heads": ("bloom", BLOOM | {"hidden_size": 48, "n_head": 6}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied": ("gpt2", GPT2 | {"tie_word_embeddings": False, "n_inner": 40, "activation_function": "gelu",
                                     "embd_pdrop": 0.2, "attn_pdrop": 0.3, "resid_pdrop": 0.0}),
    "gpt_neox": ("gpt_neox", SIZES | {"rotary_pct": 0.5, "hidden_dropout": 0.2, "attention_dropout": 0.3}),
    "gpt_neox, in sequence": ("gpt_neox", SIZES | {"use_parallel_residual": False, "attention_bias": False,
                                                    "hidden_dropout": 0.2, "attention_dropout": 0.3}),
    "phi3": ("phi3", SHARED | {"sliding_window": 9, "resid_pdrop": 0.2, "embd_pdrop": 0.1, "attention_dropout": 0.3}),
    "phi3, partly turned": ("phi3", SHARED | {"partial_rotary_factor": 0.5}),
    "phi3, longrope": ("phi3", SHARED | {"max_position_embeddings": 256, "original_max_position_embeddings": 64,
                                         "rope_parameters": LONGROPE}),
    "gemma2": ("gemma2", GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0,
                                  "attention_dropout": 0.3}),
    "gemma3": ("gemma3_text", GEMMA | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
                                       "attention_dropout": 0.3}),
    "gemma3, scaled": ("gemma3_text", GEMMA | {
        "sliding_window_pattern": 2,
        "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 50000.0},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0}}}),
    "mixtral": ("mixtral", SHARED | {"num_local_experts": 5, "num_experts_per_tok": 2, "attention_dropout": 0.3}),
    "qwen3_moe": ("qwen3_moe", MOE | {"norm_topk_prob": True, "attention_dropout": 0.3}),
    "qwen3_moe, weights that are not normalised": ("qwen3_moe", MOE | {"attention_bias": True}),
}  # fmt: skip


def make(case, folder):
    return made(transformers.AutoModelForCausalLM, *CASES[case], folder)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    theirs = make(request.param, folder)
    ours, family = load(folder)
    return SimpleNamespace(case=request.param, theirs=theirs, ours=ours, family=family, folder=folder)


@torch.no_grad()
def test_logits_agree(pair):
    ids = torch.randint(3, 61, (16, 50))
    eager = pair.theirs(ids).logits
    if pair.theirs._supports_sdpa:
        other = type(pair.theirs).from_pretrained(pair.folder, attn_implementation="sdpa").eval()(ids).logits
    else:
        other = copy.deepcopy(pair.theirs).double()(ids).logits
    check_agrees(pair.case, pair.ours(ids), eager, other)


def test_gradients_agree(pair):
    ids = torch.randint(3, 61, (2, 24))
    targets = ids.roll(-1, 1)
    theirs = pair.theirs(ids).logits
    torch.nn.functional.cross_entropy(theirs.flatten(0, 1), targets.flatten()).backward()
    pair.ours.loss(ids, targets).backward()
    found = gradients_under_their_names(pair.ours, pair.family)
    compared = 0
    if "embed_out.weight" in found:  # its name in GPT-NeoX's files, though not in the model
        found["lm_head.weight"] = found.pop("embed_out.weight")
    for name, parameter in pair.theirs.named_parameters():
        if name in found:
            scale = parameter.grad.abs().max().item()
            assert difference(found[name], parameter.grad) <= 2e-5 * scale + 1e-8, name
            compared += 1
        else:  # fused experts
            assert "experts" in name or ".gate." in name
    assert compared >= 10
    pair.theirs.zero_grad()
    pair.ours.zero_grad()


def test_training_drops_the_same(pair):
    config = pair.ours.config
    if not any(value for name, value in config.items() if name.endswith("dropout")):
        pytest.skip("nothing is dropped")
    ids = torch.randint(3, 61, (3, 20))
    check_leaves_out_the_same(pair.ours, pair.theirs, lambda: pair.ours(ids), lambda: pair.theirs(ids).logits)
    written = pair.theirs.config.to_dict()
    for name, value in pair.family.to_config(pair.ours).items():
        if "drop" in name:
            assert written[name] == value, name


@torch.no_grad()
def test_greedy_generation_is_the_same(pair):
    prompts = [torch.randint(3, 61, (n,)).tolist() for n in (9, 4)]
    steps = list(generate_ids(pair.ours, prompts, SamplingParams(temperature=0), max_tokens=24))
    for prompt, ours in zip(prompts, zip(*steps, strict=True), strict=True):
        options = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False, "eos_token_id": None}
        theirs = pair.theirs.generate(torch.tensor([prompt]), **options, pad_token_id=0)
        assert theirs[0, len(prompt) :].tolist() == list(ours)


@torch.no_grad()
def test_what_is_saved_loads_there_with_equal_logits(pair, tmp_path):
    save(pair.ours, pair.family, tmp_path / "saved")
    again = loaded_there(type(pair.theirs), tmp_path / "saved")
    ids = torch.randint(3, 61, (2, 40))
    assert torch.equal(again(ids).logits, pair.theirs(ids).logits)
    ours, _ = load(tmp_path / "saved")
    assert torch.equal(ours(ids), pair.ours(ids))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_steps_and_padding_give_the_same_bits(pair, dtype):
    ours, _ = load(pair.folder, dtype)
    rows = [torch.randint(3, 61, (n,)) for n in (23, 5, 14)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    together = ours(padded, lengths=lengths)
    for row, logits in zip(rows, together, strict=True):
        alone = ours(row[None])[0]
        assert torch.equal(logits[: len(row)], alone)
        state = ours.new_state(1, 23)
        assert torch.equal(torch.cat([ours(part[None], state)[0] for part in row.split([3, 1, len(row) - 4])]), alone)


@torch.no_grad()
def test_padding_on_the_left_is_as_in_transformers_and_the_same_bits_as_alone(pair):
    rows = [torch.randint(3, 61, (n,)) for n in (23, 5, 14)]
    for side in ("left", "right"):
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence(t, batch_first=True, padding_side=side)
            for t in (rows, [torch.ones_like(row) for row in rows])
        )
        positions = {} if pair.family.model_type == "bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        theirs, found = pair.theirs(ids, attention_mask=mask, **positions).logits, pair.ours(ids, attention_mask=mask)
        assert difference(found[mask == 1], theirs[mask == 1]) <= 1e-5 * theirs.abs().max().item()
        for row, logits, real in zip(rows, found, mask, strict=True):
            assert torch.equal(logits[real == 1], pair.ours(row[None])[0])


def test_masks_that_are_refused(pair):
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="ones next to each other"):
        pair.ours(ids, attention_mask=torch.tensor([[1, 0, 1, 1]]))
    with pytest.raises(ValueError, match="attention_mask must have shape"):
        pair.ours(ids, attention_mask=torch.ones(1, 3))


def test_weights_that_do_not_fit_are_all_listed(pair):
    tensors = load_file(pair.folder / "model.safetensors")
    first, second, *_ = sorted(n for n in tensors if n.endswith("weight") and "norm" not in n and "head" not in n)
    tensors["stranger"] = tensors.pop(first)
    tensors[second] = tensors[second][1:]
    before = [p.clone() for p in pair.ours.parameters()]
    with pytest.raises(WeightsError) as error:
        load_weights(pair.ours, pair.family, Reader(tensors))
    for message in (f"missing: {first}", "not the model's: stranger", f"wrong shape: {second} must be"):
        assert message in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.ours.parameters(), strict=True))


def test_code_of_a_checkpoint_is_refused():
    with pytest.raises(ValueError, match="asks to run code of its own"):
        check_config({"model_type": "llama", "auto_map": {"AutoModel": "modeling.Mine"}}, FAMILIES["llama"])
    with pytest.raises(ValueError, match="model_type must be 'llama', but got 'else'"):
        check_config({"model_type": "else"}, FAMILIES["llama"])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"hidden_size": -1}, "hidden_size must be a whole number from 1"),
        ({"hidden_size": None}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers must be a whole number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a number above 0"),
        ({"hidden_act": "relu"}, "hidden_act must be one of silu"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false"),
        ({"rope_scaling": {"type": "su"}}, "rope_type must be one of default, linear"),
    ],
)
def test_configs_that_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        FAMILIES["llama"].config(SHARED | setting)


@torch.no_grad()
def test_scalings_that_change_what_was_before_end_with_the_context():
    ids = torch.randint(3, 61, (1, 65))
    for family, scaling in (("llama", {"rope_type": "dynamic", "factor": 3.0}), ("phi3", LONGROPE)):
        config = SHARED | {"rope_scaling": scaling, "original_max_position_embeddings": 64}
        model = FAMILIES[family].model(**FAMILIES[family].config(config))
        model(ids[:, :64])
        with pytest.raises(ValueError, match=f"context is 64 tokens, but got 65 ids: beyond, {scaling['rope_type']}"):
            model(ids)


@pytest.mark.parametrize(
    "scaling",
    [{"rope_type": "linear", "factor": 3.0}, {"rope_type": "dynamic", "factor": 3.0}, LLAMA3, YARN,
     YARN | {"mscale": 0.7, "mscale_all_dim": 0.4, "truncate": False}, None],
    ids=["linear", "dynamic", "llama3", "yarn", "mscale", "none"],
)  # fmt: skip
def test_rotary_angles_are_those_of_transformers_bit_for_bit(scaling):
    """Those that models were trained with, also where float32 rounds off much of them."""
    config = transformers.LlamaConfig(**SHARED | {"head_dim": 128, "rope_parameters": (scaling or {}) | THETA})
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    frequencies, scale = rope_frequencies(THETA["rope_theta"], 128, scaling)
    assert torch.equal(frequencies, theirs.inv_freq) and scale == theirs.attention_scaling
    positions = torch.tensor([0, 1, 63, 4095, 131071, 1000003])
    if scaling is not None and scaling["rope_type"] == "dynamic":
        positions = positions[:3]
    x = torch.randn(1, len(positions), 2, 128)
    cos, sin = theirs(x, positions[None])
    expected, _ = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=2)
    found = ops.rope(x, positions, inv_freq=frequencies, scale=scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
    if scaling is None:
        assert torch.equal(found, ops.rope(x, positions, theta=THETA["rope_theta"]))


def test_longrope_for_longer_texts_is_as_in_transformers():
    scaling = LONGROPE | {"factor": 4.0, "original_max_position_embeddings": 64}
    config = transformers.Phi3Config(**SHARED | {"max_position_embeddings": 256}, original_max_position_embeddings=64,
                                     rope_parameters=dict(LONGROPE))  # fmt: skip
    for length in (64, 65):
        frequencies, scale = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["longrope"](config, "cpu", length)
        found = rope_frequencies(THETA["rope_theta"], 8, scaling | {"long": length > 64})
        assert torch.equal(found[0], frequencies) and found[1] == scale
    with pytest.raises(ValueError, match="short_factor must be a list of 5 numbers"):
        rope_frequencies(5000.0, 10, scaling)


@torch.no_grad()
def test_long_texts_are_read_and_gone_on_with_as_in_transformers(tmp_path):
    theirs = make("phi3, longrope", tmp_path)
    short, (ours, _) = load(tmp_path)[0], pyllm.load(tmp_path, long=True)
    assert short.context_length == 64 and ours.context_length == 256
    ids = torch.randint(3, 61, (2, 150))
    with pytest.raises(ValueError, match=r"; pyllm\.load\(..., long=True\) is for longer texts"):
        short(ids)
    expected = theirs(ids).logits
    assert difference(ours(ids), expected) <= 1e-5 * expected.abs().max().item()
    assert difference(ours(ids[:, :64]), theirs(ids[:, :64]).logits) > 1e-3  # there, the short factors
    state = ours.new_state(2, 150)
    assert torch.equal(torch.cat([ours(part, state) for part in ids.split([60, 1, 89], 1)], 1), ours(ids))
    answer = theirs.generate(ids, max_new_tokens=20, min_new_tokens=20, do_sample=False, eos_token_id=None)
    steps = list(generate_ids(ours, ids.tolist(), SamplingParams(temperature=0), max_tokens=20))
    assert answer[:, 150:].tolist() == [list(row) for row in zip(*steps, strict=True)]
    with pytest.raises(ValueError, match="context is 256 tokens"):
        ours(torch.randint(3, 61, (1, 257)))
    make("llama, yarn", tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"long must be False: it is for longrope, .* and this has yarn"):
        pyllm.load(tmp_path / "other", long=True)
    pyllm.save(ours, tmp_path / "own")
    assert torch.equal(pyllm.load(tmp_path / "own")[0](ids), ours(ids))
    with pytest.raises(CheckpointError, match="only Hugging Face folders"):
        pyllm.load(tmp_path / "own", long=True)


def test_older_names_of_settings_mean_the_same():
    def read(family, **settings):
        return FAMILIES[family].config(SHARED | settings)

    for kind in ({"type": "linear"}, {"rope_type": "linear"}):
        old = read("llama", rope_theta=5000.0, rope_scaling=kind | {"factor": 3})
        new = read("llama", rope_parameters={"rope_type": "linear", "factor": 3, "rope_theta": 5000.0})
        assert old == new
    assert read("llama", rope_scaling=None)["rope_theta"] == 10000.0
    longrope = {k: v for k, v in LONGROPE.items() if k[:4] != "rope"} | {"original_max_position_embeddings": 16}
    old = read("phi3", rope_theta=5000.0, rope_scaling=longrope | {"type": "su"})
    assert old == read("phi3", rope_parameters=longrope | THETA | {"rope_type": "longrope", "factor": 4.0})
    assert old["context_length"] == 16
    old = read("gpt_neox", rotary_pct=0.5, rotary_emb_base=777)
    assert old == read("gpt_neox", rope_parameters={"rope_theta": 777, "partial_rotary_factor": 0.5})
    old = read(
        "gemma3_text", rope_theta=5000.0, rope_local_base_freq=50.0, rope_scaling={"type": "linear", "factor": 8}
    )
    full = {"rope_type": "linear", "factor": 8, "rope_theta": 5000.0}
    assert old == read(
        "gemma3_text", rope_parameters={"full_attention": full, "sliding_attention": {"rope_theta": 50.0}}
    )


def test_weights_of_the_bare_model_and_of_another_dtype(tmp_path):
    make("gpt2", tmp_path)
    ours, family = load(tmp_path)
    bare = {name.removeprefix("transformer."): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    bare |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "lm_head.weight": bare["wte.weight"]}
    again = family.model(**ours.config)
    seen = []
    load_weights(again, family, Reader(bare), dtype=torch.bfloat16, progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (again.num_parameters(), again.num_parameters())
    assert again.head.weight is again.embedding.weight
    for a, b in zip(again.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b.to(torch.bfloat16))
