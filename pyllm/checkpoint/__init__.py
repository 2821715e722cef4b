"""Checkpoint folders: written whole or not at all, checked before they are believed."""

from pyllm.checkpoint.files import CheckpointError
from pyllm.checkpoint.folder import Checkpoint, check_savable, load_checkpoint, save_checkpoint
from pyllm.checkpoint.loading import load, save
from pyllm.checkpoint.saving import export
from pyllm.checkpoint.state import optimizer_tensors, random_state, restore_optimizer, restore_random_state
from pyllm.models import Model

Model.exporter = export  # for Model.save

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "check_savable",
    "export",
    "load",
    "load_checkpoint",
    "optimizer_tensors",
    "random_state",
    "restore_optimizer",
    "restore_random_state",
    "save",
    "save_checkpoint",
]
