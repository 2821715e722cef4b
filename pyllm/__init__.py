"""One PyTorch language model, trained, generated with and served in one package at native speed."""

import torch

from pyllm import _C, data, nn, ops
from pyllm.checkpoint import export, load, save
from pyllm.engine import Engine, SamplingParams, check, generate
from pyllm.models import RWKV, Decoder, Encoder, EncoderDecoder, LanguageModel
from pyllm.quantization import quantize
from pyllm.runtime import info, num_threads, set_num_threads, synchronize
from pyllm.text import Tokenizer
from pyllm.training import test, train

__version__: str = _C.info()["version"]
__all__ = [
    "RWKV",
    "Decoder",
    "Encoder",
    "EncoderDecoder",
    "Engine",
    "LanguageModel",
    "SamplingParams",
    "Tokenizer",
    "check",
    "data",
    "export",
    "generate",
    "info",
    "load",
    "nn",
    "num_threads",
    "ops",
    "quantize",
    "save",
    "set_num_threads",
    "synchronize",
    "test",
    "train",
]

set_num_threads(torch.get_num_threads())
