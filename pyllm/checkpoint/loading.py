from __future__ import annotations

import os

import torch

from pyllm.checkpoint.files import CheckpointError
from pyllm.checkpoint.folder import load_checkpoint, save_checkpoint
from pyllm.models import MODELS, Model
from pyllm.text import Tokenizer


def load(path: str | os.PathLike) -> tuple[Model, Tokenizer | None]:
    """The model and tokenizer of a checkpoint folder; the model is in evaluation mode.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: it is not a checkpoint, or one whose files do not fit together.
    """
    saved = load_checkpoint(path, training=False)
    if saved.model_type not in MODELS:
        raise CheckpointError(f"{path}: model_type must be one of {', '.join(MODELS)}, but got {saved.model_type!r}")
    try:
        with torch.device("meta"):
            model = MODELS[saved.model_type](**saved.config)
    except (TypeError, ValueError) as e:
        raise CheckpointError(f"{path}: config.json does not make a {saved.model_type} model: {e}") from e
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    found = {k: tuple(v.shape) for k, v in saved.weights.items()}
    if expected != found:
        wrong = [f"{k} must be {expected.get(k, 'absent')}, but got {found.get(k, 'nothing')}"
                 for k in sorted(expected.keys() | found.keys()) if expected.get(k) != found.get(k)]  # fmt: skip
        raise CheckpointError(f"{path}: {'; '.join(wrong[:5])}" + (f"; and {len(wrong) - 5} more" if wrong[5:] else ""))
    model.load_state_dict(saved.weights, assign=True)
    return model.eval(), saved.tokenizer


def save(model: Model, path: str | os.PathLike, tokenizer: Tokenizer | None = None) -> None:
    """Writes a checkpoint folder that `load` reads; an older one is replaced only once it is complete."""
    save_checkpoint(
        path, model_type=model.model_type, config=model.config, weights=model.state_dict(), tokenizer=tokenizer
    )
