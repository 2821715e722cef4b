"""Running models: sampling settings, the generation loop, and the check that a model keeps the numerics contract."""

from pyllm.engine.check import Difference, check
from pyllm.engine.decoding import why_unrecorded
from pyllm.engine.description import describe
from pyllm.engine.generation import generate, generate_ids
from pyllm.engine.sampling import SamplingParams

__all__ = ["Difference", "SamplingParams", "check", "describe", "generate", "generate_ids", "why_unrecorded"]
