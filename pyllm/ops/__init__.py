"""The compiled operations. Each has a twin of the same name and signature in `pyllm.reference`."""

from pyllm.ops.embedding import embedding
from pyllm.ops.layer_norm import layer_norm, rms_norm
from pyllm.ops.linear import linear

__all__ = ["embedding", "layer_norm", "linear", "rms_norm"]
