"""Corpora, and batches of their tokens."""

from pyllm.data.batches import SequenceDataset, SequenceLoader
from pyllm.data.corpus import embedded_corpus, read_text, split

__all__ = ["SequenceDataset", "SequenceLoader", "embedded_corpus", "read_text", "split"]
