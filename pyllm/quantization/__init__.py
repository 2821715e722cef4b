"""Weights of 8 and 4 bits: how they are chosen."""

from pyllm.models import Model
from pyllm.quantization.model import FORMATS, Quantization, quantize
from pyllm.quantization.weights import quantize_weight

Model.quantizer = quantize  # for Model.quantize

__all__ = ["FORMATS", "Quantization", "quantize", "quantize_weight"]
