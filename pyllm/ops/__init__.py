"""The compiled operations. Each has a twin of the same name and signature in `pyllm.reference`."""

from pyllm.ops.cross_entropy import cross_entropy, linear_cross_entropy
from pyllm.ops.embedding import embedding
from pyllm.ops.layer_norm import layer_norm, rms_norm
from pyllm.ops.linear import linear

__all__ = ["cross_entropy", "embedding", "layer_norm", "linear", "linear_cross_entropy", "rms_norm"]
