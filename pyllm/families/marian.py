"""Marian, the translators of OPUS-MT: as BART, with positions by sines."""

from __future__ import annotations

from pyllm.families.bart import OLDER, WEIGHTS, read, write
from pyllm.families.family import Family
from pyllm.families.settings import fixed, token_id, whole
from pyllm.models import EncoderDecoder


def _config(config: dict) -> dict:
    fixed(config, "share_encoder_decoder_embeddings", True)
    fixed(config, "normalize_embedding", False)
    fixed(config, "static_position_embeddings", True)
    vocab = whole(config, "vocab_size")
    fixed(config, "decoder_vocab_size", vocab)
    pad = token_id(config, "pad_token_id", vocab, vocab - 1)
    usual = {"pad_token_id": pad, "eos_token_id": 0, "decoder_start_token_id": pad, "forced_eos_token_id": 0}
    return read(usual | config) | {"position": "sinusoidal", "suppressed_ids": [pad]}


def _to_config(model: EncoderDecoder) -> dict:
    return write(model) | {
        "share_encoder_decoder_embeddings": True,
        "static_position_embeddings": True,
        "normalize_embedding": False,
        "bad_words_ids": [[i] for i in model.config["suppressed_ids"]],
    }


MARIAN = Family(
    "marian",
    ("MarianMTModel", "MarianModel"),
    EncoderDecoder,
    _config,
    WEIGHTS,
    _to_config,
    ignored=(r"(model\.)?(en|de)coder\.embed_positions\.weight",),
    prefix="model.",
    older=OLDER,
)
