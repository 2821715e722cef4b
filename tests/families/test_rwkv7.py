"""RWKV-7 against the published equations: a program of its own, token by token in float64, on a checkpoint's names."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import pyllm
from pyllm.checkpoint import CheckpointError
from pyllm.engine import SamplingParams, generate_ids

VOCABULARY, HIDDEN, LAYERS, HEAD, WIDE = 61, 32, 3, 8, 96
RANKS = {"w": 8, "a": 6, "v": 4, "g": 10}
CONFIG = {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"], "vocab_size": VOCABULARY,
          "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "head_dim": HEAD, "num_heads": None, "hidden_ratio": 3.0,
          "intermediate_size": None, "decay_low_rank_dim": 8, "a_low_rank_dim": 6, "v_low_rank_dim": 4,
          "gate_low_rank_dim": 10, "hidden_act": "sqrelu", "norm_first": True, "norm_bias": True, "norm_eps": 1e-5,
          "attn": None, "attn_mode": "chunk", "fuse_norm": True, "max_position_embeddings": 2048, "bos_token_id": 1,
          "eos_token_id": 2, "tie_word_embeddings": False, "value_dim": [HIDDEN] * LAYERS}  # fmt: skip


def weights():
    shapes = {"model.embeddings.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    vectors = ["model.norm.weight", "model.norm.bias", "model.layers.0.pre_norm.weight", "model.layers.0.pre_norm.bias"]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        vectors += [f"{layer}.{norm}.{kind}" for norm in ("attn_norm", "ffn_norm", "attn.g_norm")
                    for kind in ("weight", "bias")]  # fmt: skip
        vectors += [f"{layer}.attn.k_k", f"{layer}.attn.k_a", f"{layer}.ffn.x_k"]
        shapes |= {f"{layer}.attn.x_{part}": (1, 1, HIDDEN) for part in "rwkvag"}
        shapes |= {f"{layer}.attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "rkvo"}
        shapes |= {f"{layer}.attn.r_k": (HIDDEN // HEAD, HEAD)}
        for part, rank in RANKS.items():
            if part != "v" or i:
                shapes[f"{layer}.attn.{part}_lora.lora.0.weight"] = (rank, HIDDEN)
                shapes[f"{layer}.attn.{part}_lora.lora.2.weight"] = (HIDDEN, rank)
                if part != "g":
                    vectors.append(f"{layer}.attn.{part}_lora.lora.2.bias")
        shapes |= {f"{layer}.ffn.key.weight": (WIDE, HIDDEN), f"{layer}.ffn.value.weight": (HIDDEN, WIDE)}
    generator = torch.Generator().manual_seed(5)
    made = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    made |= {name: 0.5 + 0.5 * torch.randn(HIDDEN, generator=generator) for name in vectors}
    return made


def published(weights, ids):
    """Logits (T, vocabulary) of one sequence."""
    w = {name: t.double() for name, t in weights.items()}

    def norm(x, name, eps=1e-5):
        x = x - x.mean(-1, keepdim=True)
        x = (x / (x.square().mean(-1, keepdim=True) + eps).sqrt()).flatten()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def low_rank(name, x, f=lambda x: x):
        y = w[f"{name}.lora.2.weight"] @ f(w[f"{name}.lora.0.weight"] @ x)
        return y + w[f"{name}.lora.2.bias"] if f"{name}.lora.2.bias" in w else y

    zeros = torch.zeros(HIDDEN, dtype=torch.float64)
    before = {(i, part): zeros for i in range(LAYERS) for part in ("attn", "ffn")}
    states = [torch.zeros(HIDDEN // HEAD, HEAD, HEAD, dtype=torch.float64) for _ in range(LAYERS)]
    logits = []
    for token in ids:
        x = norm(w["model.embeddings.weight"][token], "model.layers.0.pre_norm")
        for i in range(LAYERS):
            name = f"model.layers.{i}.attn"
            h = norm(x, f"model.layers.{i}.attn_norm")
            r, decay, k, v, a, g = (h + (before[i, "attn"] - h) * w[f"{name}.x_{part}"].flatten() for part in "rwkvag")
            before[i, "attn"] = h
            v_in = v
            r, k, v = (w[f"{name}.{part}_proj.weight"] @ t for part, t in (("r", r), ("k", k), ("v", v)))
            decay = torch.exp(-math.exp(-0.5) * low_rank(f"{name}.w_lora", decay, torch.tanh).sigmoid())
            if i == 0:
                first = v
            else:
                v = v + (first - v) * low_rank(f"{name}.v_lora", v_in).sigmoid()
            a = low_rank(f"{name}.a_lora", a).sigmoid()
            g = low_rank(f"{name}.g_lora", g, torch.sigmoid)
            kappa = (k * w[f"{name}.k_k"]).view(-1, HEAD)
            kappa = kappa / kappa.norm(dim=-1, keepdim=True)
            k = k * (1 + (a - 1) * w[f"{name}.k_a"])
            r, decay, k, v, a = (t.view(-1, HEAD) for t in (r, decay, k, v, a))
            transition = torch.diag_embed(decay) - kappa[:, :, None] * (a * kappa)[:, None]
            states[i] = states[i] @ transition + v[:, :, None] * k[:, None]
            y = norm((states[i] @ r[..., None])[..., 0], f"{name}.g_norm", HEAD * 1e-5)
            y = y + ((r * k * w[f"{name}.r_k"]).sum(-1, keepdim=True) * v).flatten()
            x = x + w[f"{name}.o_proj.weight"] @ (y * g)
            name = f"model.layers.{i}.ffn"
            h = norm(x, f"model.layers.{i}.ffn_norm")
            k = w[f"{name}.key.weight"] @ (h + (before[i, "ffn"] - h) * w[f"{name}.x_k"])
            before[i, "ffn"] = h
            x = x + w[f"{name}.value.weight"] @ k.relu().square()
        logits.append(w["lm_head.weight"] @ norm(x, "model.norm"))
    return torch.stack(logits)


def write(folder, config, tensors):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    tensors = weights()
    folder = write(tmp_path_factory.mktemp("rwkv7") / "hf", CONFIG, tensors)
    return pyllm.load(folder)[0], tensors


@torch.no_grad()
def test_logits_are_those_of_the_published_equations(made):
    model, tensors = made
    ids = torch.randint(VOCABULARY, (2, 23))
    expected = torch.stack([published(tensors, row.tolist()) for row in ids])
    difference = (model(ids).double() - expected).abs().max()
    assert difference < 2e-5 * expected.abs().max(), difference


def test_gradients_are_those_of_the_published_equations(made):
    model, tensors = made
    ids, targets = torch.randint(VOCABULARY, (1, 7)), torch.randint(VOCABULARY, (1, 7))
    leaves = {name: t.double().requires_grad_() for name, t in tensors.items()}
    expected = torch.nn.functional.cross_entropy(published(leaves, ids[0].tolist()), targets[0])
    expected.backward()
    loss = model.loss(ids, targets)
    ours = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close(loss.double(), expected.detach(), rtol=1e-5, atol=0)
    exported = pyllm.RWKV(**model.config)
    for parameter, gradient in zip(exported.parameters(), ours, strict=True):
        parameter.data = gradient
    found = dict(pyllm.families.export_weights(exported, pyllm.families.FAMILIES["rwkv7"]))
    assert found.keys() == leaves.keys()
    for name, leaf in leaves.items():
        error = (found[name].double() - leaf.grad).abs().max()
        assert error <= 1e-4 * leaf.grad.abs().max() + 1e-7, f"{name}: {error:.3g}"


def test_greedy_ids(made):
    model, tensors = made
    prompt = [5, 9, 1, 33]
    found = [ids[0] for ids in generate_ids(model, [prompt], SamplingParams(temperature=0), max_tokens=12)]
    for given in found:
        assert published(tensors, prompt)[-1].argmax() == given
        prompt.append(given)


def test_export_gives_the_checkpoint_back(made, tmp_path):
    model, tensors = made
    pyllm.export(model, tmp_path / "out")
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert again.keys() == tensors.keys() and all(torch.equal(t, tensors[name]) for name, t in again.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert all(config[key] == CONFIG[key] for key in ("model_type", "architectures", "hidden_size", "head_dim"))
    assert config["intermediate_size"] == WIDE
    loaded, _ = pyllm.load(tmp_path / "out", dtype=torch.bfloat16)
    assert pyllm.check(loaded, length=20) == []


@pytest.mark.parametrize(("change", "message"), [
    ({"attn": {"layers": [1]}}, "attn must be None"),
    ({"head_dim": 7}, "hidden_size must be a multiple of head_dim, but got 32 and 7"),
    ({"num_heads": 3}, "num_heads must be 4"),
    ({"hidden_act": "relu"}, "hidden_act must be 'sqrelu'"),
    ({"decay_low_rank_dim": 9}, r"w_lora.lora.0.weight must be \(9, 32\), but is \(8, 32\)"),
    ({"value_dim": [64] * 3}, "value_dim must be"),
    ({"auto_map": {"AutoModel": "x.Y"}}, "never done"),
])  # fmt: skip
def test_configs_that_are_refused(change, message, tmp_path):
    folder = write(tmp_path / "hf", CONFIG | change, weights())
    with pytest.raises(CheckpointError, match=message):
        pyllm.load(folder)
