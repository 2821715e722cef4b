"""The architectures that GGUF files come in: a table for each, by which their models are read and written.

A family's "config" is here a file's metadata (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), without the
architecture's name before each key, and with what follows from the tensors: `TENSORS`, their shapes by name, and
`SLOWING`, what the frequencies of rotary positions are divided by.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyllm.checkpoint.files import short
from pyllm.families import Family, Weight, export_weights
from pyllm.families.llama import linear
from pyllm.models import Decoder
from pyllm.nn.position import rope_frequencies

TENSORS, SLOWING = "tensors", "rope_freqs.weight"
_LARGEST = 1 << 24  # no number of a config is larger
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}  # always
_REQUIRED: Any = object()


@dataclass(frozen=True)
class Architecture(Family):
    """A row of `ARCHITECTURES`.

    families: whose models it is for; `family_of` says which one a model is of.
    rotary_pairs: query and key rows that turn together are neighbours in the file.
    one_plus: the weights of norms have 1 added to them in the file.
    """

    families: tuple[str, ...] = ()
    rotary_pairs: bool = False
    one_plus: bool = False

    def family_of(self, settings: dict) -> str:
        if self.model_type != "llama":
            return self.families[0]
        return "mixtral" if settings["num_experts"] else "mistral" if settings["window"] else "llama"


class _Key(NamedTuple):
    """A number of the metadata, and the setting of our model that it is. Where it is 0 or missing: the default, which
    may follow from the settings before it."""

    name: str
    setting: str
    kind: type
    default: Any = _REQUIRED


def _head_dim(settings: dict) -> int:
    return settings["hidden_size"] // settings["num_heads"]


_SIZES = (
    _Key("embedding_length", "hidden_size", int),
    _Key("block_count", "num_layers", int),
    _Key("attention.head_count", "num_heads", int),
    _Key("feed_forward_length", "intermediate_size", int),
    _Key("context_length", "context_length", int),
)
_LAYER_NORM = _Key("attention.layer_norm_epsilon", "norm_eps", float)
_ROPE = (
    _Key("attention.layer_norm_rms_epsilon", "norm_eps", float),
    _Key("attention.head_count_kv", "num_kv_heads", int, lambda settings: settings["num_heads"]),
    _Key("attention.key_length", "head_dim", int, _head_dim),
    _Key("rope.freq_base", "rope_theta", float, 10000.0),
)
_WINDOW = _Key("attention.sliding_window", "window", int, None)

_OURS, _THEIRS = "blocks.{i}", "blk.{i}"
_NAMES = {
    "embedding": "token_embd",
    "position_embedding": "position_embd",
    "embedding_norm": "token_embd_norm",
    "norm": "output_norm",
    "head": "output",
    f"{_OURS}.attention_norm": f"{_THEIRS}.attn_norm",
    f"{_OURS}.attention.out": f"{_THEIRS}.attn_output",
    f"{_OURS}.attention.q_norm": f"{_THEIRS}.attn_q_norm",
    f"{_OURS}.attention.k_norm": f"{_THEIRS}.attn_k_norm",
    f"{_OURS}.attention_post_norm": f"{_THEIRS}.post_attention_norm",
    f"{_OURS}.feed_forward_norm": f"{_THEIRS}.ffn_norm",
    f"{_OURS}.feed_forward.down": f"{_THEIRS}.ffn_down",
    f"{_OURS}.feed_forward_post_norm": f"{_THEIRS}.post_ffw_norm",
    f"{_OURS}.feed_forward.router": f"{_THEIRS}.ffn_gate_inp",
    f"{_OURS}.feed_forward.experts.{{e}}.down": f"{_THEIRS}.ffn_down.{{e}}",
}
_COMMON = tuple(weight for ours, theirs in _NAMES.items() for weight in linear(ours, theirs))
_APART = (
    *_COMMON,
    *linear(f"{_OURS}.attention.qkv", *(f"{_THEIRS}.attn_{n}" for n in "qkv")),
    *linear(f"{_OURS}.feed_forward.up", f"{_THEIRS}.ffn_gate", f"{_THEIRS}.ffn_up"),
    *linear(f"{_OURS}.feed_forward.experts.{{e}}.up", f"{_THEIRS}.ffn_gate.{{e}}", f"{_THEIRS}.ffn_up.{{e}}"),
)
_JOINED = (
    *_COMMON,
    *linear(f"{_OURS}.attention.qkv", f"{_THEIRS}.attn_qkv"),
    *linear(f"{_OURS}.feed_forward.up", f"{_THEIRS}.ffn_up"),
)


def _architecture(name: str, families: tuple[str, ...], fixed: dict[str, Any], keys: tuple[_Key, ...],
                  weights: tuple[Weight, ...] = _APART, read: Callable[[Callable, dict], dict] = lambda get, s: {},
                  write: Callable[[dict], dict] = lambda s: {}, rotary_pairs: bool = False,
                  one_plus: bool = False) -> Architecture:  # fmt: skip
    """`fixed`: what the settings of all its models are; `read` and `write` add what `keys` do not say."""
    keys = (*_SIZES, *keys)

    def config(metadata: dict) -> dict:
        get = functools.partial(_value, name, metadata)
        settings = fixed | {"vocab_size": _rows(metadata, "token_embd.weight"),
                            "tie_embeddings": "output.weight" not in metadata[TENSORS]}  # fmt: skip
        for key in keys:
            default = key.default(settings) if callable(key.default) else key.default
            settings[key.setting] = get(key.name, key.kind, default)
        if settings["num_layers"] > len(metadata[TENSORS]):
            raise ValueError(f"{name}.block_count must be at most {len(metadata[TENSORS])}, the number of tensors, "
                             f"but is {settings['num_layers']}")  # fmt: skip
        return settings | _read_rope(get, metadata.get(SLOWING), settings) | read(get, settings)

    def to_config(model: Decoder) -> dict:
        settings = dict(model.config)
        settings["num_kv_heads"] = settings["num_kv_heads"] or settings["num_heads"]
        settings["head_dim"] = settings["head_dim"] or _head_dim(settings)
        found = {key.name: settings[key.setting] for key in keys}
        found = {"vocab_size": settings["vocab_size"]} | found | _write_rope(settings) | write(settings)
        return {key: value for key, value in found.items() if value is not None} | {
            TENSORS: {name: tuple(tensor.shape) for name, tensor in export_weights(model, table)}
        }

    table = Architecture(name, (), Decoder, config, weights, to_config, families=families, rotary_pairs=rotary_pairs,
                         one_plus=one_plus)  # fmt: skip
    return table


def _value(name: str, metadata: dict, key: str, kind: type, default: Any = _REQUIRED) -> Any:
    value = metadata.get(key)
    fits = type(value) is kind
    unset = fits and kind is not bool and value == 0  # as good as missing
    if value is None or (unset and default is not _REQUIRED):
        if default is _REQUIRED:
            raise ValueError(f"there must be {name}.{key} in its metadata, but it is missing")
        return default
    if not fits:
        raise ValueError(f"{name}.{key} must be of {kind.__name__}, but is {short(value)}")
    if kind is int and not 1 <= value <= _LARGEST:
        raise ValueError(f"{name}.{key} must be in [1, {_LARGEST}], but is {value}")
    return float(str(np.float32(value))) if kind is float else value  # the decimal number that was meant


def _rows(metadata: dict, name: str) -> int:
    shape = metadata[TENSORS].get(name)
    if shape is None or len(shape) != 2:
        raise ValueError(f"there must be a matrix {name}, but it is {'of shape ' + str(shape) if shape else 'missing'}")
    return shape[0]


def _read_rope(get: Callable, slowing: Tensor | None, settings: dict) -> dict:
    if "rope_theta" not in settings:
        return {}
    head = settings.get("head_dim", _head_dim(settings))
    turning = get("rope.dimension_count", int, head)
    if ("rotary_dim" not in settings and turning != head) or turning > head:
        raise ValueError(f"rope.dimension_count must be the head's {head}, but is {turning}")
    if (value := get("attention.value_length", int, head)) != head:
        raise ValueError(f"attention.value_length must be the head's {head}, but is {value}")
    kind, scaling = get("rope.scaling.type", str, "none"), None
    if kind not in ("none", "linear", "yarn"):
        raise ValueError(f"rope.scaling.type must be none, linear or yarn, but is {short(kind)}")
    if slowing is not None:
        if kind != "none":
            raise ValueError(f"there must be {SLOWING} or a rope.scaling.type, but there are both")
        scaling = _llama3(slowing, settings["rope_theta"], turning)
    elif kind != "none":
        scaling = {"rope_type": kind, "factor": get("rope.scaling.factor", float)}
        if kind == "yarn":
            original = get("rope.scaling.original_context_length", int, settings["context_length"])
            scaling["original_max_position_embeddings"] = original
    return {"rope_scaling": scaling, "rotary_dim": None if turning == head else turning}


def _write_rope(settings: dict) -> dict:
    if settings["position"] != "rope":
        return {}
    head, scaling = settings["head_dim"], settings["rope_scaling"] or {"rope_type": "none"}
    turning, kind = settings["rotary_dim"] or head, scaling["rope_type"]
    found = {"attention.value_length": head, "rope.dimension_count": turning}
    if kind == "llama3":
        plain, _ = rope_frequencies(settings["rope_theta"], turning, None)
        slowed, _ = rope_frequencies(settings["rope_theta"], turning, scaling)
        return found | {SLOWING: plain / slowed}
    if kind == "none":
        return found
    original = scaling.get("original_max_position_embeddings") if kind == "yarn" else None
    return found | {"rope.scaling.type": kind, "rope.scaling.factor": scaling.get("factor"),
                    "rope.scaling.original_context_length": original}  # fmt: skip


def _llama3(slowing: Tensor, theta: float, turning: int) -> dict[str, Any]:
    """The Hugging Face setting that Llama 3's slowing of rotary positions came from."""
    factor = float(slowing.max()) if slowing.numel() else 0.0
    scaling = {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    expected = torch.zeros(0)
    if 1 <= factor <= _LARGEST:
        expected = rope_frequencies(theta, turning, None)[0] / rope_frequencies(theta, turning, scaling)[0]
    if slowing.shape != expected.shape or not torch.allclose(slowing.float(), expected, rtol=1e-4):
        raise ValueError(f"{SLOWING} must slow rotary positions as Llama 3 does, for {turning // 2} "
                         f"frequencies, but is {short(slowing.tolist())}")  # fmt: skip
    return scaling


def _read_llama(get: Callable, settings: dict) -> dict:
    tensors = get(TENSORS, dict)
    router = tensors.get("blk.0.ffn_gate_inp.weight", (0,))
    if settings["num_experts"] != router[0]:
        raise ValueError(f"llama.expert_count must be its tensors' {router[0]}, but is {settings['num_experts']}")
    return {"qkv_bias": "blk.0.attn_q.bias" in tensors, "bias": "blk.0.attn_output.bias" in tensors,
            "mlp_bias": "blk.0.ffn_down.bias" in tensors}  # fmt: skip


def _read_qwen3(get: Callable, settings: dict) -> dict:
    bias = "blk.0.attn_output.bias" in get(TENSORS, dict)
    return {"qkv_bias": bias, "bias": bias, "mlp_bias": False}


def _gemma_scale(settings: dict) -> float:
    """Of the scores of attention, where a file does not say it: by the head's size, but in the 27B models."""
    return (_head_dim(settings) if settings["num_layers"] in (46, 62) else settings["head_dim"]) ** -0.5


def _windowed(layers: int, every: int) -> list[int]:
    return [i for i in range(layers) if (i + 1) % every]


def _read_gemma(every: int | None, get: Callable, settings: dict) -> dict:
    scale = get("attention.scale", float, None)
    every = every or get("attention.sliding_window_pattern", int, 6)
    return {
        "embedding_scale": settings["hidden_size"] ** 0.5,
        "attention_scale": _gemma_scale(settings) if scale is None else float(round(scale**-2)) ** -0.5,
        "window_layers": _windowed(settings["num_layers"], every),
    }


def _write_gemma(fixed: int | None, settings: dict) -> dict:
    layers, scale = settings["num_layers"], settings["attention_scale"]
    found = {} if scale == _gemma_scale(settings) else {"attention.scale": scale}
    if fixed is None:
        recurring = (n for n in (6, *range(1, layers + 2)) if settings["window_layers"] == _windowed(layers, n))
        found["attention.sliding_window_pattern"] = next(recurring, None)
    return found


def _gemma(name: str, family: str, every: int | None, fixed: dict, *keys: _Key) -> Architecture:
    fixed = {"norm": "one_plus_rms_norm", "post_norms": True, "activation": "geglu_tanh"} | fixed
    return _architecture(name, (family,), fixed, (*_ROPE, _WINDOW._replace(default=_REQUIRED), *keys),
                         read=functools.partial(_read_gemma, every), write=functools.partial(_write_gemma, every),
                         one_plus=True)  # fmt: skip


_BIASED = {"norm": "layer_norm", "qkv_bias": True, "bias": True, "mlp_bias": True}
_EXPERTS = (_Key("expert_count", "num_experts", int, 0), _Key("expert_used_count", "active_experts", int, 2))

ARCHITECTURES: dict[str, Architecture] = {
    a.model_type: a
    for a in (
        _architecture("llama", ("llama", "mistral", "mixtral"), {}, (*_ROPE, _WINDOW, *_EXPERTS), read=_read_llama,
                      rotary_pairs=True),
        _architecture("qwen2", ("qwen2",), {"qkv_bias": True}, _ROPE),
        _architecture("qwen3", ("qwen3",), {"head_norm": True}, _ROPE, read=_read_qwen3),
        _architecture("qwen3moe", ("qwen3_moe",), {"head_norm": True},
                      (*_ROPE, *_EXPERTS, _Key("expert_feed_forward_length", "intermediate_size", int)),
                      read=_read_qwen3),
        _gemma("gemma2", "gemma2", 2, {}, _Key("attn_logit_softcapping", "attention_softcap", float, 50.0),
               _Key("final_logit_softcapping", "logit_softcap", float, 30.0)),
        _gemma("gemma3", "gemma3_text", None, {"head_norm": True},
               _Key("rope.freq_base_swa", "window_rope_theta", float, 10000.0),
               _Key("final_logit_softcapping", "logit_softcap", float, None)),
        _architecture("phi3", ("phi3",), {"rotary_dim": None}, (*_ROPE, _WINDOW), _JOINED),
        _architecture("gpt2", ("gpt2",), _BIASED | {"position": "learned", "activation": "gelu_tanh"}, (_LAYER_NORM,),
                      _JOINED),
        _architecture("gptneox", ("gpt_neox",), _BIASED | {"rotary_dim": None, "activation": "gelu"},
                      (_LAYER_NORM, _Key("rope.freq_base", "rope_theta", float, 10000.0),
                       _Key("use_parallel_residual", "parallel_residual", bool, True)), _JOINED),
        _architecture("bloom", ("bloom",), _BIASED | {"position": "alibi", "embedding_norm": True,
                                                      "activation": "gelu_tanh"}, (_LAYER_NORM,), _JOINED),
    )
}  # fmt: skip
