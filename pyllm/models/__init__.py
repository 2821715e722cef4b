"""A page per kind of model, built from `pyllm.nn`."""

from pyllm.models.decoder import Decoder
from pyllm.models.encoder import Encoder
from pyllm.models.encoder_decoder import EncoderDecoder, Memory, Pair
from pyllm.models.model import Model
from pyllm.models.recurrent import LanguageModel
from pyllm.models.rwkv import RWKV

MODELS: dict[str, type[Model]] = {m.model_type: m for m in (LanguageModel, Decoder, Encoder, EncoderDecoder, RWKV)}

__all__ = ["MODELS", "RWKV", "Decoder", "Encoder", "EncoderDecoder", "LanguageModel", "Memory", "Model", "Pair"]
