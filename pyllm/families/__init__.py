"""The families of models that checkpoints come in: a table for each."""

from pyllm.families.bart import BART
from pyllm.families.bert import BERT
from pyllm.families.bloom import BLOOM
from pyllm.families.distilbert import DISTILBERT
from pyllm.families.family import (
    Family,
    PackedReader,
    Weight,
    WeightReader,
    WeightsError,
    check_config,
    export_weights,
    load_weights,
)
from pyllm.families.gemma import GEMMA2, GEMMA3
from pyllm.families.gpt2 import GPT2
from pyllm.families.llama import LLAMA, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN3_MOE
from pyllm.families.marian import MARIAN
from pyllm.families.neox import NEOX
from pyllm.families.phi3 import PHI3
from pyllm.families.roberta import CAMEMBERT, ROBERTA, XLM_ROBERTA
from pyllm.families.rwkv7 import RWKV7
from pyllm.families.t5 import T5

_ALL = (
    BART,
    BERT,
    BLOOM,
    CAMEMBERT,
    DISTILBERT,
    GEMMA2,
    GEMMA3,
    GPT2,
    LLAMA,
    MARIAN,
    MISTRAL,
    MIXTRAL,
    NEOX,
    PHI3,
    QWEN2,
    QWEN3,
    QWEN3_MOE,
    ROBERTA,
    RWKV7,
    T5,
    XLM_ROBERTA,
)
FAMILIES: dict[str, Family] = {family.model_type: family for family in _ALL}

__all__ = [
    "FAMILIES",
    "Family",
    "PackedReader",
    "Weight",
    "WeightReader",
    "WeightsError",
    "check_config",
    "export_weights",
    "load_weights",
]
