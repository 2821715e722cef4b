"""Running models: sampling settings and the generation loop."""

from pyllm.engine.generation import generate, generate_ids
from pyllm.engine.sampling import SamplingParams

__all__ = ["SamplingParams", "generate", "generate_ids"]
