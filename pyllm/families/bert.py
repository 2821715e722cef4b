"""BERT: norms after each layer, learned positions, an embedding of the segments; and what RoBERTa shares with it."""

from __future__ import annotations

from collections.abc import Collection

from pyllm.families.family import Family, Weight
from pyllm.families.llama import linear
from pyllm.families.settings import choice, fixed, flag, fraction, label_names, number, one_of, to_labels, whole
from pyllm.models import Encoder
from pyllm.models.heads import PROBLEMS

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
               "relu": "relu", "silu": "silu", "swish": "silu"}  # fmt: skip
NAMES = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}
TASKS = {None: "Model", "masked_lm": "ForMaskedLM", "sequence": "ForSequenceClassification",
         "tokens": "ForTokenClassification", "span": "ForQuestionAnswering"}  # fmt: skip
OLDER = (("LayerNorm\\.gamma$", "LayerNorm.weight"), ("LayerNorm\\.beta$", "LayerNorm.bias"))


def architectures(name: str) -> tuple[str, ...]:
    return tuple(f"{name}{task}" for task in TASKS.values())


def task(config: dict, name: str) -> dict:
    """The head that the config's architecture has, and what it needs to know."""
    heads = {f"{name}{task}": head for head, task in TASKS.items()} | {f"{name}ForPreTraining": "masked_lm"}
    named = [a for a in config.get("architectures") or [] if a in heads]
    head = heads[named[0]] if named else None
    return {
        "head": head,
        "labels": label_names(config) if head in ("sequence", "tokens") else None,
        "problem": one_of(config, "problem_type", PROBLEMS) if head == "sequence" else None,
        "pooler": head is None and flag(config, "add_pooling_layer", False),
    }


def to_task(model: Encoder, name: str) -> dict:
    """The reverse of `task`."""
    c = model.config
    said = {"architectures": [name + TASKS[c["head"]]]}
    if c["labels"] is not None:
        said |= to_labels(c["labels"])
    if c["problem"] is not None:
        said |= {"problem_type": c["problem"]}
    return said | ({"add_pooling_layer": c["pooler"]} if c["head"] is None else {})


def completed(config: dict, names: Collection[str], name: str, prefix: str, masked: str) -> dict:
    """A config that says what only the weights' names tell: whether there is a pooler, and, where no architecture is
    named, or one with a head though the weights are those of the bare model, that there is or is not a head."""
    architectures = config.get("architectures")
    if not any(n.startswith(prefix) for n in names):
        architectures = [f"{name}Model"]
    elif not architectures:
        architectures = [f"{name}ForMaskedLM" if masked in names else f"{name}Model"]
    pooler = any(n.endswith("pooler.dense.weight") for n in names)
    return config | {"architectures": architectures, "add_pooling_layer": pooler}


def read(config: dict, name: str) -> dict:
    fixed(config, "is_decoder", False)
    fixed(config, "add_cross_attention", False)
    fixed(config, "position_embedding_type", "absolute")
    fixed(config, "pruned_heads", {})
    dropout = fraction(config, "hidden_dropout_prob", 0.1)
    said = task(config, name)
    return said | {
        "vocab_size": whole(config, "vocab_size"),
        "hidden_size": whole(config, "hidden_size"),
        "num_layers": whole(config, "num_hidden_layers"),
        "num_heads": whole(config, "num_attention_heads"),
        "intermediate_size": whole(config, "intermediate_size"),
        "context_length": whole(config, "max_position_embeddings", 512),
        "num_segments": whole(config, "type_vocab_size", 2),
        "padding_id": whole(config, "pad_token_id", 0, least=0),
        "activation": choice(config, "hidden_act", ACTIVATIONS, "gelu"),
        "norm_eps": number(config, "layer_norm_eps", 1e-12),
        "tie_embeddings": flag(config, "tie_word_embeddings", True),
        "dropout": dropout,
        "attention_dropout": fraction(config, "attention_probs_dropout_prob", 0.1),
        "head_dropout": 0.0 if said["head"] == "span" else fraction(config, "classifier_dropout", dropout),
    }


def write(model: Encoder, name: str) -> dict:
    c = model.config
    if c["num_segments"] == 0:
        raise ValueError(f"{name} must have segments")
    return to_task(model, name) | {
        "vocab_size": c["vocab_size"],
        "hidden_size": c["hidden_size"],
        "num_hidden_layers": c["num_layers"],
        "num_attention_heads": c["num_heads"],
        "intermediate_size": c["intermediate_size"],
        "max_position_embeddings": c["context_length"],
        "type_vocab_size": c["num_segments"],
        "pad_token_id": c["padding_id"],
        "hidden_act": NAMES[c["activation"]],
        "layer_norm_eps": c["norm_eps"],
        "tie_word_embeddings": c["tie_embeddings"],
        "hidden_dropout_prob": c["dropout"],
        "attention_probs_dropout_prob": c["attention_dropout"],
        "classifier_dropout": None if c["head"] == "span" else c["head_dropout"],
    }


def body(prefix: str) -> tuple[Weight, ...]:
    layer = f"{prefix}encoder.layer.{{i}}"
    return (
        Weight("embedding.weight", (f"{prefix}embeddings.word_embeddings.weight",)),
        Weight("position_embedding.weight", (f"{prefix}embeddings.position_embeddings.weight",)),
        Weight("segment_embedding.weight", (f"{prefix}embeddings.token_type_embeddings.weight",)),
        *linear("embedding_norm", f"{prefix}embeddings.LayerNorm"),
        *linear("blocks.{i}.attention.qkv", *(f"{layer}.attention.self.{n}" for n in ("query", "key", "value"))),
        *linear("blocks.{i}.attention.out", f"{layer}.attention.output.dense"),
        *linear("blocks.{i}.attention_norm", f"{layer}.attention.output.LayerNorm"),
        *linear("blocks.{i}.feed_forward.up", f"{layer}.intermediate.dense"),
        *linear("blocks.{i}.feed_forward.down", f"{layer}.output.dense"),
        *linear("blocks.{i}.feed_forward_norm", f"{layer}.output.LayerNorm"),
        *linear("pooler", f"{prefix}pooler.dense"),
        *linear("head.tagger", "classifier"),
        *linear("head.span", "qa_outputs"),
    )


BERT = Family(
    "bert",
    (*architectures("Bert"), "BertForPreTraining"),
    Encoder,
    lambda config: read(config, "Bert"),
    (
        *body("bert."),
        *linear("head.pooler", "bert.pooler.dense"),
        *linear("head.classifier", "classifier"),
        *linear("head.transform", "cls.predictions.transform.dense"),
        *linear("head.norm", "cls.predictions.transform.LayerNorm"),
        *linear("head.decoder", "cls.predictions.decoder"),
    ),
    lambda model: write(model, "Bert"),
    ignored=(r"(bert\.)?embeddings\.position_ids", r"(bert\.)?pooler\.dense\..*", r"cls\.seq_relationship\..*"),
    prefix="bert.",
    older=(*OLDER, (r"^cls\.predictions\.bias$", "cls.predictions.decoder.bias")),
    complete=lambda config, names: completed(config, names, "Bert", "bert.", "cls.predictions.transform.dense.weight"),
)
