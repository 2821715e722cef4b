"""The families of models that checkpoints come in: a table for each."""

from pyllm.families.bloom import BLOOM
from pyllm.families.family import Family, Weight, WeightReader, WeightsError, check_config, export_weights, load_weights
from pyllm.families.gemma import GEMMA2, GEMMA3
from pyllm.families.gpt2 import GPT2
from pyllm.families.llama import LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE
from pyllm.families.neox import NEOX
from pyllm.families.phi3 import PHI3

FAMILIES: dict[str, Family] = {
    f.model_type: f for f in (BLOOM, GEMMA2, GEMMA3, GPT2, LLAMA, MISTRAL, MIXTRAL, NEOX, PHI3, QWEN2, QWEN3, QWEN3_MOE)
}

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
