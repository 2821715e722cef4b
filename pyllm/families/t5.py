"""T5: biases by distance, RMS norms, attention without a scale; and T5 1.1, with a gate and a head of its own."""

from __future__ import annotations

from collections.abc import Collection

from pyllm.families.family import Family, Weight
from pyllm.families.settings import answer_ids, choice, fixed, flag, fraction, number, to_answer_ids, token_id, whole
from pyllm.models import EncoderDecoder

_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "silu": "silu", "gated-gelu": "geglu_tanh",
                "gated-gelu_new": "geglu_tanh", "gated-silu": "swiglu"}  # fmt: skip
_NAMES = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "geglu_tanh": "gated-gelu",
          "swiglu": "gated-silu"}  # fmt: skip


def _config(config: dict) -> dict:
    fixed(config, "is_encoder_decoder", True)
    vocab, hidden, heads = whole(config, "vocab_size"), whole(config, "d_model"), whole(config, "num_heads")
    layers = whole(config, "num_layers")
    pad = token_id(config, "pad_token_id", vocab, 0)
    tied, dropout = flag(config, "tie_word_embeddings", True), fraction(config, "dropout_rate", 0.1)
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_layers": whole(config, "num_decoder_layers", layers),
        "num_heads": heads,
        "encoder_num_layers": layers,
        "head_dim": whole(config, "d_kv", 64),
        "intermediate_size": whole(config, "d_ff"),
        "position": "relative",
        "num_buckets": whole(config, "relative_attention_num_buckets", 32),
        "max_distance": whole(config, "relative_attention_max_distance", 128),
        "attention_scale": 1.0,
        "norm": "rms_norm",
        "norm_eps": number(config, "layer_norm_epsilon", 1e-6),
        "activation": choice(config, "feed_forward_proj", _ACTIVATIONS, "relu"),
        "output_scale": hidden**-0.5 if flag(config, "scale_decoder_outputs", tied) else None,
        "tie_embeddings": tied,
        "dropout": dropout,
        "attention_dropout": dropout,
        "activation_dropout": dropout,
    } | answer_ids({"pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": 1} | config, vocab)


def _complete(config: dict, names: Collection[str]) -> dict:
    """Newer configs say that the head is tied also where it is not, but then have scale_decoder_outputs."""
    scaled = flag(config, "scale_decoder_outputs", flag(config, "tie_word_embeddings", True))
    return config | {"tie_word_embeddings": scaled or "lm_head.weight" not in names, "scale_decoder_outputs": scaled}


def _to_config(model: EncoderDecoder) -> dict:
    c = model.config
    return {
        "is_encoder_decoder": True,
        "vocab_size": c["vocab_size"],
        "d_model": c["hidden_size"],
        "d_kv": c["head_dim"] or c["hidden_size"] // c["num_heads"],
        "d_ff": c["intermediate_size"],
        "num_layers": c["encoder_num_layers"],
        "num_decoder_layers": c["num_layers"],
        "num_heads": c["num_heads"],
        "relative_attention_num_buckets": c["num_buckets"],
        "relative_attention_max_distance": c["max_distance"],
        "layer_norm_epsilon": c["norm_eps"],
        "feed_forward_proj": _NAMES[c["activation"]],
        "scale_decoder_outputs": c["output_scale"] is not None,
        "tie_word_embeddings": c["tie_embeddings"],
        "dropout_rate": c["dropout"],
    } | to_answer_ids(c)


def _side(side: str, layers: tuple[tuple[str, str], ...]) -> tuple[Weight, ...]:
    """The rows of the encoder or decoder, whose blocks have attention layers (ours, theirs) and a feed-forward one."""
    theirs = f"{side}.block.{{i}}.layer"
    rows = [
        Weight(
            f"{side}.relative_bias.weight", (f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",)
        ),
        Weight(f"{side}.norm.weight", (f"{side}.final_layer_norm.weight",)),
    ]
    for n, (ours, name) in enumerate(layers):
        block, parts = f"{side}.blocks.{{i}}.{ours}", {p: f"{theirs}.{n}.{name}.{p}.weight" for p in "qkvo"}
        rows += [
            Weight(f"{block}.qkv.weight", (parts["q"], parts["k"], parts["v"])),
            Weight(f"{block}.query.weight", (parts["q"],)),
            Weight(f"{block}.kv.weight", (parts["k"], parts["v"])),
            Weight(f"{block}.out.weight", (parts["o"],)),
            Weight(f"{block}_norm.weight", (f"{theirs}.{n}.layer_norm.weight",)),
        ]
    block, last = f"{side}.blocks.{{i}}.feed_forward", f"{theirs}.{len(layers)}"
    dense = f"{last}.DenseReluDense"
    return (
        *rows,
        Weight(f"{block}.up.weight", (f"{dense}.wi_0.weight", f"{dense}.wi_1.weight"), gated=True),
        Weight(f"{block}.up.weight", (f"{dense}.wi.weight",), gated=False),
        Weight(f"{block}.down.weight", (f"{dense}.wo.weight",)),
        Weight(f"{block}_norm.weight", (f"{last}.layer_norm.weight",)),
    )


T5 = Family(
    "t5",
    ("T5ForConditionalGeneration", "T5WithLMHeadModel", "T5Model"),
    EncoderDecoder,
    _config,
    (
        Weight("embedding.weight", ("shared.weight",)),
        Weight("head.weight", ("lm_head.weight",)),
        *_side("encoder", (("attention", "SelfAttention"),)),
        *_side("decoder", (("attention", "SelfAttention"), ("cross_attention", "EncDecAttention"))),
    ),
    _to_config,
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    older=((r"^(en|de)coder\.embed_tokens\.weight$", "shared.weight"),),
    complete=_complete,
)
