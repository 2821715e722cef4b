"""Models make every tensor on the device that they are on: tried on "meta", whose tensors do not mix with the CPU's,
with the twins in place of the operations, which have no kernels there."""

import os
import subprocess
import sys

CODE = """
import torch, pyllm
from pyllm import ops

# The twin compares lengths with the capacity, and on "meta" there is nothing to compare.
ops.next_positions = lambda lengths, count, _: (lengths[:, None] + torch.arange(count, device=lengths.device), lengths)
ids = torch.zeros(2, 9, dtype=torch.int64, device="meta")
for options in (
    {},
    {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    {"window": 8, "window_layers": [0], "head_norm": True, "num_kv_heads": 2},
    {"position": "learned", "norm": "layer_norm", "activation": "gelu"},
    {"position": "alibi", "embedding_norm": True},
    {"embedding_scale": 2.0, "logit_softcap": 30.0, "post_norms": True},
):
    model = pyllm.Decoder(50, 32, 2, 4, context_length=64, **options).to("meta")
    assert model.device.type == "meta"
    ops.cross_entropy(model(ids), ids).backward()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())
    with torch.no_grad():
        state = model.new_state(2, 64)
        assert state.lengths.is_meta and state.caches[0].keys.is_meta
        assert model(ids, state=state).is_meta and model(ids[:, :1], state=state).is_meta
recurrent = [pyllm.LanguageModel(50, 16, 2, cell=cell) for cell in ("rnn", "gru", "lstm")]
for model in (*recurrent, pyllm.RWKV(50, 16, 2, head_dim=8)):
    model = model.to("meta")
    ops.cross_entropy(model(ids), ids).backward()
    assert all(p.grad is None or p.grad.is_meta for p in model.parameters())
    with torch.no_grad():
        state = model.new_state(2)
        assert all(v.is_meta for v in state.vectors) and state.lengths.is_meta
        assert model(ids, state=state).is_meta and model(ids[:, :1], state=state).is_meta
assert pyllm.Encoder(50, 32, 2, 4).to("meta").hidden(ids).is_meta
"""


def test_every_tensor_is_where_the_model_is():
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"PYLLM_REFERENCE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
