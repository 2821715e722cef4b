"""Running models: sampling settings, the generation loop, the engine of many requests, and the check that a model keeps
the numerics contract."""

from pyllm.engine.beams import Beam
from pyllm.engine.check import Difference, check
from pyllm.engine.decoding import why_unrecorded
from pyllm.engine.description import describe
from pyllm.engine.engine import Engine
from pyllm.engine.generation import generate_ids
from pyllm.engine.prompt_file import PromptFileError, answer_file
from pyllm.engine.reading import Score
from pyllm.engine.request import Request
from pyllm.engine.sampling import SamplingParams
from pyllm.engine.texts import generate

__all__ = ["Beam", "Difference", "Engine", "PromptFileError", "Request", "SamplingParams", "Score", "answer_file",
           "check", "describe", "generate", "generate_ids", "why_unrecorded"]  # fmt: skip
