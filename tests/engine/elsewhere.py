"""Engines, generation and training of models that are not on the CPU, tried without a GPU: a tensor that says it is on
"meta" but holds its values, and refuses to mix with the CPU's. Run with PYLLM_REFERENCE=1: the twins are torch's."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import pyllm
from pyllm import ops
from pyllm.engine import generate_ids

aten = torch.ops.aten
MOVES = {aten.copy_.default, aten._to_copy.default}
TAKES_INDICES_OF_THE_CPU = {aten.index.Tensor, aten.index_put_.default}
META = torch.device("meta")


class Elsewhere(torch.Tensor):
    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=META)  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})

    def tolist(self):  # which torch has for its own tensors alone
        return self.inner.tolist()


def inner(x: Any) -> Any:
    return x.inner if isinstance(x, Elsewhere) else x


def call(func, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [t for t in tensors if not isinstance(t, Elsewhere) and t.dim()]
    device, there = kwargs.get("device"), len(tensors) > len(here) and any(isinstance(t, Elsewhere) for t in tensors)
    indices = func in TAKES_INDICES_OF_THE_CPU and isinstance(args[0], Elsewhere)
    if here and there and func not in MOVES and not indices:
        raise RuntimeError(f"{func.name()} must get all tensors on one device")
    out = func(*tree_map(inner, args), **tree_map(inner, kwargs | ({"device": "cpu"} if device is not None else {})))
    if func._schema.is_mutable:
        return args[0]
    wanted = there if device is None else torch.device(device) == META
    return tree_map(lambda t: Elsewhere(t) if isinstance(t, Tensor) else t, out) if wanted else out


class Allocations(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return call(func, args, kwargs or {})


class Constants(TorchFunctionMode):
    """torch.tensor, whose values would be lost before any dispatch."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is not torch.tensor or torch.device(kwargs.get("device") or "cpu") != META:
            return func(*args, **kwargs)
        return Elsewhere(func(*args, **kwargs | {"device": "cpu"}))


def sample(logits, *, history=None, logit_bias=None, given=None, **settings):
    if logits.shape == (1, 1):  # settings are looked at, of no model
        return twin(logits, history=history, **settings)
    assert isinstance(logits, Elsewhere)
    for t in (history, logit_bias, given):
        assert t is None or isinstance(t, Elsewhere)
    assert not any(isinstance(t, Elsewhere) for t in settings.values()), "settings must be on the CPU"
    on_device = {"history": history, "logit_bias": logit_bias, "given": given}
    drawn = twin(logits.inner, **{k: inner(v) for k, v in on_device.items()}, **settings)
    return ops.Sample(*(Elsewhere(t) for t in drawn))


twin, ops.sample = ops.sample, sample


def moved(model):
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({k: Elsewhere(t.detach()) for k, t in own.items() if t is not None})
        if isinstance(module, torch.nn.RNNBase):
            module._flat_weights = [module._parameters[name] for name in module._flat_weights_names]
    return model.eval()


def results(model, bias):
    params = pyllm.SamplingParams
    settings = [params(seed=1), params(seed=2, repetition_penalty=1.3), params(seed=3, logit_bias=bias),
                params(seed=4, allowed_ids=(3, 5, 9))]  # fmt: skip
    prompts = [[1, 2, 3], [4] * 9, [1, 2, 3, 7], [8]]
    engine = pyllm.Engine(model, max_sequences=3, max_length=32, chunk=5)
    found = [(r.ids, r.logprobs) for r in engine.generate(prompts, settings, max_tokens=6)]
    found.append([s.ids for s in engine.submit([5, 6], settings[0], max_tokens=4, n=2).samples])
    if not model.answers:
        found += [[t.tolist() for t in score] for score in engine.score(prompts[:2], settings[1])]
        found.append(engine.embed(prompts[:3]).tolist())
    if isinstance(model, pyllm.Decoder):
        found.append([(beam.ids, beam.score) for beam in engine.beam_search([1, 2], 2, max_tokens=4)])
        ahead = pyllm.Engine(model, max_sequences=2, max_length=32, speculate="lookup")
        found.append([r.ids for r in ahead.generate([[1, 2, 1, 2, 1]], settings[0], max_tokens=6)])
    found += [list(generate_ids(model, prompts, one, max_tokens=4)) for one in settings[:3]]
    return found


def build(kind):
    torch.manual_seed(0)
    if kind == "decoder":
        return pyllm.Decoder(20, 16, 2, 4, num_kv_heads=2, context_length=64).eval()
    if kind == "answers":
        return pyllm.EncoderDecoder(20, 16, 1, 2, context_length=64).eval()
    if kind == "sinusoidal":
        return pyllm.EncoderDecoder(20, 16, 1, 2, context_length=64, position="sinusoidal").eval()
    if kind == "alibi":
        return pyllm.Decoder(20, 16, 2, 4, context_length=64, position="alibi").eval()
    if kind == "rwkv":
        return pyllm.RWKV(20, 16, 2, head_dim=8).eval()
    return pyllm.LanguageModel(20, 16, 2, cell=kind).eval()


if __name__ == "__main__":
    import sys

    bias = torch.randn(20)
    ops.sample = twin
    expected = results(build(sys.argv[1]), bias)
    ops.sample = sample
    with Constants(), Allocations():
        found = results(moved(build(sys.argv[1])), bias)
    assert found == expected, "other results than on the CPU"
