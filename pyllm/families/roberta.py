"""RoBERTa, and its kin by other languages: as BERT, with places counted from behind the padding's id, and heads of its
own."""

from __future__ import annotations

from pyllm.families.bert import OLDER, architectures, body, completed, read, write
from pyllm.families.family import Family
from pyllm.families.llama import linear
from pyllm.families.settings import whole
from pyllm.models import Encoder


def _config(config: dict, name: str) -> dict:
    settings = read(config, name)
    padding = whole(config, "pad_token_id", 1, least=0)
    if settings["context_length"] <= padding + 1:
        raise ValueError(f"config: max_position_embeddings must be above pad_token_id + 1 = {padding + 1}, but got "
                         f"{settings['context_length']}")  # fmt: skip
    if settings["head"] == "masked_lm" and settings["activation"] != "gelu":
        raise ValueError(f"config: hidden_act must be 'gelu', as its head's is, but got {config['hidden_act']!r}")
    return settings | {
        "padding_id": padding,
        "skip_padding": True,
        "pooler_dropout": settings["head_dropout"],
        "context_length": settings["context_length"] - padding - 1,
    }


def _to_config(model: Encoder, name: str) -> dict:
    c = model.config
    return write(model, name) | {"max_position_embeddings": c["context_length"] + c["padding_id"] + 1}


def _family(model_type: str, name: str) -> Family:
    return Family(
        model_type,
        architectures(name),
        Encoder,
        lambda config: _config(config, name),
        (
            *body("roberta."),
            *linear("head.pooler", "classifier.dense"),
            *linear("head.classifier", "classifier.out_proj"),
            *linear("head.transform", "lm_head.dense"),
            *linear("head.norm", "lm_head.layer_norm"),
            *linear("head.decoder", "lm_head.decoder"),
        ),
        lambda model: _to_config(model, name),
        ignored=(r"(roberta\.)?embeddings\.position_ids", r"(roberta\.)?pooler\.dense\..*"),
        prefix="roberta.",
        older=(*OLDER, (r"^lm_head\.bias$", "lm_head.decoder.bias")),
        complete=lambda config, names: completed(config, names, name, "roberta.", "lm_head.dense.weight"),
    )


ROBERTA = _family("roberta", "Roberta")
XLM_ROBERTA = _family("xlm-roberta", "XLMRoberta")
CAMEMBERT = _family("camembert", "Camembert")
