"""Each operation in plain torch, written to be read: what the compiled one is tested against."""

from pyllm.reference.layer_norm import layer_norm, rms_norm

__all__ = ["layer_norm", "rms_norm"]
