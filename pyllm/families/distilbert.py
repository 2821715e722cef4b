"""DistilBERT: BERT without segments, and with heads of its own."""

from __future__ import annotations

from pyllm.families.bert import ACTIVATIONS, NAMES, architectures, completed, task, to_task
from pyllm.families.family import Family, Weight
from pyllm.families.llama import linear
from pyllm.families.settings import choice, fixed, flag, fraction, whole
from pyllm.models import Encoder

_LAYER = "distilbert.transformer.layer.{i}"


def _config(config: dict) -> dict:
    fixed(config, "pruned_heads", {})
    dropout = fraction(config, "dropout", 0.1)
    said = task(config, "DistilBert")
    of_head = {"sequence": ("seq_classif_dropout", 0.2), "span": ("qa_dropout", 0.1)}
    return said | {
        "vocab_size": whole(config, "vocab_size"),
        "hidden_size": whole(config, "dim", 768),
        "num_layers": whole(config, "n_layers", 6),
        "num_heads": whole(config, "n_heads", 12),
        "intermediate_size": whole(config, "hidden_dim", 3072),
        "context_length": whole(config, "max_position_embeddings", 512),
        "num_segments": 0,
        "padding_id": whole(config, "pad_token_id", 0, least=0),
        "activation": choice(config, "activation", ACTIVATIONS, "gelu"),
        "norm_eps": 1e-12,
        "head_activation": "relu",
        "tie_embeddings": flag(config, "tie_word_embeddings", True),
        "dropout": dropout,
        "attention_output_dropout": 0.0,
        "attention_dropout": fraction(config, "attention_dropout", 0.1),
        "head_dropout": fraction(config, *of_head[said["head"]]) if said["head"] in of_head else dropout,
    }


def _to_config(model: Encoder) -> dict:
    c = model.config
    return to_task(model, "DistilBert") | {
        "vocab_size": c["vocab_size"],
        "dim": c["hidden_size"],
        "n_layers": c["num_layers"],
        "n_heads": c["num_heads"],
        "hidden_dim": c["intermediate_size"],
        "max_position_embeddings": c["context_length"],
        "pad_token_id": c["padding_id"],
        "activation": NAMES[c["activation"]],
        "tie_word_embeddings": c["tie_embeddings"],
        "dropout": c["dropout"],
        "attention_dropout": c["attention_dropout"],
        "seq_classif_dropout": c["head_dropout"],
        "qa_dropout": c["head_dropout"],
    }


DISTILBERT = Family(
    "distilbert",
    architectures("DistilBert"),
    Encoder,
    _config,
    (
        Weight("embedding.weight", ("distilbert.embeddings.word_embeddings.weight",)),
        Weight("position_embedding.weight", ("distilbert.embeddings.position_embeddings.weight",)),
        *linear("embedding_norm", "distilbert.embeddings.LayerNorm"),
        *linear("blocks.{i}.attention.qkv", *(f"{_LAYER}.attention.{n}_lin" for n in "qkv")),
        *linear("blocks.{i}.attention.out", f"{_LAYER}.attention.out_lin"),
        *linear("blocks.{i}.attention_norm", f"{_LAYER}.sa_layer_norm"),
        *linear("blocks.{i}.feed_forward.up", f"{_LAYER}.ffn.lin1"),
        *linear("blocks.{i}.feed_forward.down", f"{_LAYER}.ffn.lin2"),
        *linear("blocks.{i}.feed_forward_norm", f"{_LAYER}.output_layer_norm"),
        *linear("head.pooler", "pre_classifier"),
        *linear("head.classifier", "classifier"),
        *linear("head.tagger", "classifier"),
        *linear("head.span", "qa_outputs"),
        *linear("head.transform", "vocab_transform"),
        *linear("head.norm", "vocab_layer_norm"),
        *linear("head.decoder", "vocab_projector"),
    ),
    _to_config,
    ignored=(r"(distilbert\.)?embeddings\.position_ids",),
    prefix="distilbert.",
    complete=lambda config, names: completed(config, names, "DistilBert", "distilbert.", "vocab_transform.weight"),
)
