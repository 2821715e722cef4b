"""Activations of one request among others, captured and replaced."""

import contextlib

import pytest
import torch

import pyllm

KINDS = ["llama", "window", "rwkv", "gru", "t5", "bart"]
PARAMS = pyllm.SamplingParams(seed=4)


def new(kind):
    torch.manual_seed(3)
    if kind == "gru":
        model = pyllm.LanguageModel(40, 16, 1, cell="gru")
    elif kind == "rwkv":
        model = pyllm.RWKV(40, 24, 2, head_dim=8)
    elif kind in ("t5", "bart"):
        model = pyllm.EncoderDecoder(40, 16, 2, 4, context_length=400, post_norm=kind == "bart")
    else:
        model = pyllm.Decoder(40, 16, 2, 4, context_length=400, window=70 if kind == "window" else None)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model.eval()


def names(kind):
    if kind == "gru":
        return ["embedding", "rnn"]
    side = "decoder." if kind in ("t5", "bart") else ""
    layer = "channel_mix" if kind == "rwkv" else "feed_forward"
    return [f"{side}blocks.0", f"{side}blocks.1", f"{side}blocks.1.{layer}"]


def finish(engine, requests):
    while any(r.reason is None for r in requests):
        engine.step()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_captured_is_what_the_whole_model_gives(kind):
    model = new(kind)
    prompt = [(7 * i) % 40 for i in range(150)]
    plain = pyllm.Engine(model, num_pages=40)
    expected, *others = plain.generate([prompt, [1, 2], prompt[:100]], PARAMS, max_tokens=20)
    captured = None
    for chunk in (1000, 64, 7):
        engine = pyllm.Engine(model, num_pages=40, chunk=chunk)
        made = [engine.submit(prompt, PARAMS, max_tokens=20, capture=names(kind)),
                *(engine.submit(r.source or r.prompt, PARAMS, max_tokens=20) for r in others)]  # fmt: skip
        finish(engine, made)
        for request, alone in zip(made, (expected, *others), strict=True):
            assert request.ids == alone.ids and request.logprobs == alone.logprobs
        assert not made[1].captured and list(made[0].captured) == names(kind)
        assert captured is None or all(torch.equal(t, captured[n]) for n, t in made[0].captured.items())
        captured = made[0].captured
        if kind not in ("gru", "rwkv"):
            assert engine.pool.pages.available == 40
    ids, found = torch.tensor([expected.sequence[:-1]]), {}
    for name in names(kind):
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: found.setdefault(name, y))
    with torch.no_grad():
        model(pyllm.models.Pair(torch.tensor([prompt]), ids) if model.answers else ids)
    for name, tensor in captured.items():
        y = found[name]
        if "blocks" in name and not name.endswith(("mix", "forward")):
            y = y[1] if y[0] is None else y[0] + y[1]
        y = y[0] if isinstance(y, tuple) else y
        assert torch.equal(tensor, y[0])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_replaced_goes_on_for_that_request_alone(kind):
    model, name = new(kind), names(kind)[-2]
    prompt = [(3 * i) % 40 for i in range(100)]
    plain = pyllm.Engine(model, num_pages=40)
    (expected,) = plain.generate([prompt], PARAMS, max_tokens=20)
    steering, seen = torch.linspace(-3, 3, 24 if kind == "rwkv" else 16), []

    def steer(y, positions):
        seen.append(positions)
        return y + steering

    engine = pyllm.Engine(model, num_pages=40, chunk=64)
    hooks = ({}, {"replace": {name: steer}}, {"replace": {name: lambda y, positions: y.clone()}}, {})
    made = [engine.submit(prompt, PARAMS, max_tokens=20, **options) for options in hooks]
    finish(engine, made)
    again = engine.submit(prompt, PARAMS, max_tokens=20)  # of what was known, nothing is of the steered
    finish(engine, [again])
    for i in (0, 2, 3):
        assert made[i].ids == expected.ids and made[i].logprobs == expected.logprobs
    assert again.logprobs == expected.logprobs != made[1].logprobs
    assert [i for r in seen for i in r] == list(range(len(made[1].sequence) - 1))

    def add(module, args, y):
        if not isinstance(y, tuple):
            return y + steering
        delta, x, *rest = y
        return torch.zeros_like(x), (x if delta is None else x + delta) + steering, *rest

    model.get_submodule(name).register_forward_hook(add)
    steered = pyllm.Engine(model, num_pages=40)
    request = steered.submit(prompt, PARAMS, max_tokens=20)
    finish(steered, [request])
    assert request.ids == made[1].ids and request.logprobs == made[1].logprobs


@pytest.mark.parametrize("kind", ["llama", "gru", "t5"])
def test_an_error_in_a_hook_ends_that_request_alone(kind):
    model = new(kind)
    first, *_ = names(kind)
    (expected,) = pyllm.Engine(model, num_pages=40).generate([[5, 6]], PARAMS, max_tokens=12)

    def fail(y, positions):
        if positions.stop > 4:
            raise RuntimeError("no more")
        return y

    def cancel(y, positions):
        made[1].cancel()
        return y

    engine = pyllm.Engine(model, num_pages=40)
    faults = {
        "no more": fail,
        "must give torch.float32": lambda y, positions: y.double(),
        "gave a NoneType": lambda y, positions: None,
    }
    made = [engine.submit([5, 6], PARAMS, max_tokens=12)]
    made.append(engine.submit([5, 6], PARAMS, max_tokens=12, replace={first: cancel}))
    made += [engine.submit([5, 6], PARAMS, max_tokens=12, replace={first: f}) for f in faults.values()]
    made.append(engine.submit([5, 6], PARAMS, max_tokens=12, capture=["head"]))
    finish(engine, made)
    assert made[0].logprobs == expected.logprobs and made[1].reason == "cancelled"
    for request, message in zip(made[2:], (*faults, "head does not run in a step"), strict=True):
        assert request.reason == "error" and message in str(request.error)
    assert made[2].ids == expected.ids[: len(made[2].ids)]
    assert not engine._running and not any(m._forward_hooks for m in model.modules())
    if kind != "gru":
        assert engine.pool.pages.available == 40


def test_an_interrupted_step_captures_nothing_twice(monkeypatch):
    for kind in ("llama", "gru"):
        model, name = new(kind), names(kind)[0]
        engine = pyllm.Engine(model, num_pages=10, chunk=50)
        whole = engine.submit([5] * 120, PARAMS, max_tokens=5, capture=[name])
        finish(engine, [whole])
        draw, note, calls = engine._draw, engine.pool.note, []

        def interrupt(*args, then=None, calls=calls):
            calls.append(1)
            if len(calls) in (2, 4):
                raise KeyboardInterrupt
            return then(*args)

        for at, then in (("_draw", draw), ("note", note)):
            calls.clear()
            target = engine if at == "_draw" else engine.pool
            monkeypatch.setattr(target, at, lambda *a, then=then: interrupt(*a, then=then))
            request = engine.submit([5] * 120, PARAMS, max_tokens=5, capture=[name])
            while request.reason is None:
                with contextlib.suppress(KeyboardInterrupt):
                    engine.step()
            monkeypatch.setattr(target, at, then)
            assert len(calls) > 4 and request.logprobs == whole.logprobs
            assert torch.equal(request.captured[name], whole.captured[name])


def test_settings_are_checked():
    engine = pyllm.Engine(new("llama"))
    for error, message, options in (
        (ValueError, "no module 'block.0': near it are blocks.0", {"capture": ["block.0"]}),
        (ValueError, "no module ''", {"capture": [""]}),
        (TypeError, "the replacement of blocks.0 must be a function, but got 3", {"replace": {"blocks.0": 3}}),
        (TypeError, "capture and replace must be for one continuation, but n is 2", {"capture": ["blocks.0"], "n": 2}),
    ):  # fmt: skip
        with pytest.raises(error, match=message):
            engine.submit([1], **options)
