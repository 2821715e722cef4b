"""The families of models that checkpoints come in: a table for each."""

from pyllm.families.family import Family, Weight, WeightReader, WeightsError, check_config, export_weights, load_weights
from pyllm.families.llama import LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3

FAMILIES: dict[str, Family] = {f.model_type: f for f in (LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3)}

__all__ = [
    "FAMILIES",
    "Family",
    "Weight",
    "WeightReader",
    "WeightsError",
    "check_config",
    "export_weights",
    "load_weights",
]
