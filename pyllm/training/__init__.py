"""Training and evaluating language models."""

from pyllm.training.loop import Interrupted, train
from pyllm.training.metrics import History, Metrics, test
from pyllm.training.optimizer import AdamW
from pyllm.training.report import plot_losses
from pyllm.training.schedule import warmup_cosine

__all__ = ["AdamW", "History", "Interrupted", "Metrics", "plot_losses", "test", "train", "warmup_cosine"]
