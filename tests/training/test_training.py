import os
import signal
import threading

import pytest
import torch
import torch.nn.functional as F

import pyllm
from pyllm.checkpoint import optimizer_tensors, restore_optimizer
from pyllm.data import SequenceLoader
from pyllm.training import AdamW, History, Interrupted, plot_losses, warmup_cosine

TEXT = "abcdefgh" * 200


@pytest.fixture(scope="module")
def tokenizer():
    return pyllm.Tokenizer.train("char", [TEXT])


@pytest.fixture
def loader(tokenizer):
    return SequenceLoader(tokenizer.encode(TEXT), 4, 16)


def new(kind, tokenizer, dropout=0.0, optimizer=torch.optim.Adam):
    torch.manual_seed(5)
    if kind == "gpt":
        model = pyllm.Decoder(tokenizer.vocab_size, 16, 2, 2, context_length=16, dropout=dropout)
    else:
        model = pyllm.LanguageModel(tokenizer.vocab_size, 16, 2, dropout, cell=kind)
    return model, optimizer(model.parameters(), lr=0.01)


@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm", "gpt"])
def test_learns_a_cycle(kind, tokenizer, loader):
    model, optimizer = new(kind, tokenizer)
    history = pyllm.train(model, loader, optimizer, epochs=4, validation=loader, progress=False)
    assert len(history.losses) == 4 * len(loader)
    assert history.losses[0] > 1.5 and history.losses[-1] < 0.3
    metrics = pyllm.test(model, loader)
    assert metrics == history.validation[-1][1]
    assert metrics.accuracy > 0.9 and metrics.perplexity < 1.4
    assert metrics.tokens == len(loader) * 4 * 16


def test_a_criterion_of_the_users_own_gives_the_same_as_the_models_loss(tokenizer, loader):
    losses = []
    for criterion in (None, torch.nn.CrossEntropyLoss()):
        model, optimizer = new("lstm", tokenizer)
        losses.append(pyllm.train(model, loader, optimizer, criterion, steps=5, progress=False).losses)
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_metrics_are_those_of_the_plain_formulas(tokenizer, loader):
    model, _ = new("gpt", tokenizer)
    logits, targets = zip(*[(model(x).detach(), y) for x, y in loader], strict=True)
    logits, targets = torch.cat(logits).flatten(0, 1), torch.cat(targets).flatten()
    metrics = pyllm.test(model, loader)
    assert metrics.loss == pytest.approx(float(F.cross_entropy(logits, targets)), rel=1e-5)
    assert metrics.accuracy == pytest.approx(float((logits.argmax(-1) == targets).float().mean()))
    assert metrics.bits_per_byte(metrics.tokens) == pytest.approx(metrics.loss / 0.6931472, rel=1e-6)


def test_a_model_trains_on_after_a_test_that_failed(tokenizer, loader):
    model, _ = new("gpt", tokenizer)
    with pytest.raises(IndexError):
        pyllm.test(model.train(), [(torch.full((1, 4), 10**6), torch.zeros(1, 4, dtype=torch.int64))])
    assert model.training


def test_state_is_carried_between_batches_on_purpose(tokenizer, loader):
    model, optimizer = new("lstm", tokenizer)
    carried, fresh = (pyllm.test(model, loader, carry_state=c).loss for c in (None, False))
    assert carried != fresh
    state, total = model.new_state(4), 0.0
    with torch.no_grad():
        for x, y in loader:
            total += float(F.cross_entropy(model(x, state).flatten(0, 1), y.flatten()))
    assert carried == pytest.approx(total / len(loader), rel=1e-6)
    shuffled = SequenceLoader(tokenizer.encode(TEXT), 4, 16, shuffle=True)
    with pytest.raises(ValueError, match="batches that continue each other"):
        pyllm.train(model, shuffled, optimizer, carry_state=True)
    with pytest.raises(ValueError, match="needs a recurrent model, but got Decoder"):
        pyllm.test(new("gpt", tokenizer)[0], loader, carry_state=True)


def test_a_plain_module_and_a_torch_data_loader_train(tokenizer):
    """The tutorial's program, in torch's own parts."""

    class Network(torch.nn.Module):
        def __init__(self, vocab_size, hidden_size):
            super().__init__()
            self.embedding = torch.nn.Embedding(vocab_size, hidden_size)
            self.rnn = torch.nn.LSTM(hidden_size, hidden_size, batch_first=True)
            self.linear = torch.nn.Linear(hidden_size, vocab_size)

        def forward(self, x):
            output, hidden = self.rnn(self.embedding(x))
            return self.linear(output), hidden

    model = Network(tokenizer.vocab_size, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    dataset = pyllm.data.SequenceDataset(tokenizer.encode(TEXT), 16)
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    history = pyllm.train(model, loader, optimizer, torch.nn.CrossEntropyLoss(), epochs=6, progress=False)
    assert history.losses[-1] < history.losses[0] / 2
    assert pyllm.test(model, loader).accuracy > 0.8
    with pytest.raises(TypeError, match=r"only a pyllm\.models\.Model can be saved"):
        pyllm.train(model, loader, optimizer, folder="never-written")
    with pytest.raises(ValueError, match=r"must return logits \(B, T, vocabulary\)"):
        pyllm.train(torch.nn.Flatten(), loader, optimizer, progress=False)


@pytest.mark.parametrize(("kind", "optimizer"), [("lstm", torch.optim.Adam), ("gpt", AdamW)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_resuming_continues_bit_for_bit(kind, optimizer, shuffle, tokenizer, tmp_path):
    loader = SequenceLoader(tokenizer.encode(TEXT), 4, 16, shuffle=shuffle, seed=3)
    steps = len(loader) + 7
    held_out = SequenceLoader(tokenizer.encode(TEXT[:300]), 2, 16)
    options = {"steps": steps, "schedule": warmup_cosine(steps), "validation": held_out, "validate_every": 9,
               "tokenizer": tokenizer, "progress": False}  # fmt: skip
    model, made = new(kind, tokenizer, 0.2, optimizer)
    whole = pyllm.train(model, loader, made, folder=tmp_path / "whole", **options)

    for stop in (1, 13, len(loader), len(loader) + 2):
        folder = tmp_path / f"stopped-{stop}"
        model, made = new(kind, tokenizer, 0.2, optimizer)
        interrupt = Interrupting(loader, after=stop)
        with pytest.raises(Interrupted, match=f"stopped after step {stop} of {steps}, saved to") as caught:
            pyllm.train(model, interrupt, made, folder=folder, **options)
        assert caught.value.history.losses == whole.losses[:stop]
        torch.manual_seed(99)
        model, made = new(kind, tokenizer, 0.2, optimizer)
        torch.rand(5)
        history = pyllm.train(model, loader, made, folder=folder, resume=True, **options)
        assert history.losses == whole.losses
        assert history.validation == whole.validation
        resumed, _ = pyllm.load(folder)
        expected, _ = pyllm.load(tmp_path / "whole")
        for a, b in zip(resumed.parameters(), expected.parameters(), strict=True):
            assert torch.equal(a, b)


def test_our_adamw_clips_and_goes_on_from_torchs(tokenizer, loader):
    losses = []
    for kind in (AdamW, torch.optim.AdamW):
        model, optimizer = new("gpt", tokenizer, optimizer=kind)
        losses.append(pyllm.train(model, loader, optimizer, steps=6, clip_norm=0.1, progress=False).losses)
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
    saved = optimizer_tensors(optimizer, model)
    ours = AdamW(model.parameters())
    restore_optimizer(ours, model, saved)
    twin = new("gpt", tokenizer)[0]
    twin.load_state_dict(model.state_dict())
    theirs = torch.optim.AdamW(twin.parameters())
    restore_optimizer(theirs, twin, optimizer_tensors(ours, model))
    for own, step in ((model, ours), (twin, theirs)):
        own.zero_grad()
        own.loss(*loader.batch(0, 9)).backward()
        step.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(int(s["step"]) == 7 for s in ours.state.values())
    ours.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match=r"\[AdamW\] amsgrad must be false, but got True"):
        ours.step()


def test_our_adamw_takes_what_has_a_gradient(tokenizer):
    one, other = (torch.ones(3, requires_grad=True) for _ in range(2))
    half = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    optimizer = AdamW([one, other, half], lr=0.1)
    for wanted in (one, one + other):
        optimizer.zero_grad()
        (wanted.sum() + half.sum()).backward()
        assert optimizer.step(lambda: 7) == 7
    assert [int(optimizer.state[p]["step"]) for p in (one, other, half)] == [2, 1, 2]
    assert optimizer.state[half]["exp_avg"].dtype == torch.float32
    one.grad = torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match=r"gradients must be dense, but got one of layout torch.sparse_coo"):
        optimizer.step()


class Interrupting:
    """A loader during whose n-th batch the user presses Ctrl-C."""

    def __init__(self, loader, after):
        self.loader, self.after, self.contiguous = loader, after, loader.contiguous

    def __len__(self):
        return len(self.loader)

    def signature(self):
        return self.loader.signature()

    def batch(self, epoch, step):
        if epoch * len(self) + step + 1 == self.after:
            os.kill(os.getpid(), signal.SIGINT)
        return self.loader.batch(epoch, step)

    def __iter__(self):
        return iter(self.loader)


def test_training_elsewhere_than_in_the_main_thread(tokenizer, loader):
    model, optimizer = new("rnn", tokenizer)
    results = []
    thread = threading.Thread(
        target=lambda: results.append(pyllm.train(model, loader, optimizer, steps=2, progress=False))
    )
    thread.start()
    thread.join()
    assert len(results[0].losses) == 2


def test_what_cannot_be_resumed_says_why(tokenizer, loader, tmp_path):
    model, optimizer = new("lstm", tokenizer)
    with pytest.raises(ValueError, match="resume=True needs the folder"):
        pyllm.train(model, loader, optimizer, resume=True)
    with pytest.raises(FileNotFoundError):
        pyllm.train(model, loader, optimizer, resume=True, folder=tmp_path / "nowhere")
    pyllm.save(model, tmp_path / "only-a-model", tokenizer)
    with pytest.raises(ValueError, match="holds a model but no training to resume"):
        pyllm.train(model, loader, optimizer, resume=True, folder=tmp_path / "only-a-model")
    pyllm.train(model, loader, optimizer, steps=2, folder=tmp_path / "a", tokenizer=tokenizer, progress=False)
    with pytest.raises(ValueError, match="the checkpoint's batches were"):
        pyllm.train(model, SequenceLoader(tokenizer.encode(TEXT), 4, 15), optimizer, resume=True, folder=tmp_path / "a")
    half, optimizer = new("lstm", tokenizer)
    with pytest.raises(ValueError, match=r"holds embedding.weight in torch.float32, but got torch.bfloat16"):
        pyllm.train(half.bfloat16(), loader, optimizer, resume=True, folder=tmp_path / "a")
    other, optimizer = new("gru", tokenizer)
    with pytest.raises(ValueError, match="holds a recurrent"):
        pyllm.train(other, loader, optimizer, resume=True, folder=tmp_path / "a")
    with pytest.raises(ValueError, match="known from the step alone"):
        pyllm.train(model, list(loader), optimizer, resume=True, folder=tmp_path / "a")


def test_a_loss_that_is_not_finite_stops_the_training(tokenizer, loader, tmp_path):
    model, optimizer = new("rnn", tokenizer)
    with torch.no_grad():
        model.head.bias[0] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1: try a smaller learning rate"):
        pyllm.train(model, loader, optimizer, folder=tmp_path / "x", progress=False)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("kind", [torch.optim.Adam, AdamW])
def test_gradients_that_are_not_finite_stop_the_training_before_they_reach_the_weights(
    kind, tokenizer, loader, tmp_path
):
    model, optimizer = new("rnn", tokenizer, optimizer=kind)
    pyllm.train(model, loader, optimizer, steps=2, folder=tmp_path, progress=False)
    before = [p.clone() for p in model.parameters()]
    model.head.bias.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(FloatingPointError, match=r"the norm of the gradients is (nan|inf) at step 3: try a smaller"):
        pyllm.train(model, loader, optimizer, steps=3, folder=tmp_path, resume=True, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    for a, b in zip(pyllm.load(tmp_path)[0].parameters(), before, strict=True):
        assert torch.equal(a, b)


def test_what_cannot_be_saved_is_said_before_the_first_step(tokenizer, loader, tmp_path):
    model, optimizer = new("rnn", tokenizer)
    before, options = model.head.weight.clone(), {"steps": 2, "progress": False}
    extra = torch.optim.Adam([*model.parameters(), torch.nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match=r"its parameters must be the model's, but one of shape \(2,\) is not"):
        pyllm.train(model, loader, extra, folder=tmp_path / "a", **options)
    with pytest.raises(TypeError, match="training/settings/where must be a tensor or what JSON can hold"):
        pyllm.train(model, loader, optimizer, folder=tmp_path / "a", settings={"where": tmp_path}, **options)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="must be a folder for checkpoints, but is one itself"):
        pyllm.train(model, loader, optimizer, folder=tmp_path, **options)
    with pytest.raises(ValueError, match="the loader must have a batch, but has none"):
        pyllm.train(model, [], optimizer, **options)
    assert torch.equal(model.head.weight, before) and not (tmp_path / "a").exists()


def test_schedule():
    factor = warmup_cosine(100, warmup=10)
    assert [round(factor(s), 6) for s in (0, 9, 10)] == [0.1, 1.0, 1.0]
    assert factor(99) == pytest.approx(0.1, abs=1e-3) and factor(1000) == pytest.approx(0.1)
    assert all(factor(s + 1) <= factor(s) for s in range(10, 120))


def test_the_picture_is_a_png(tmp_path, tokenizer, loader):
    model, optimizer = new("rnn", tokenizer)
    history = pyllm.train(model, loader, optimizer, steps=6, validation=loader, progress=False)
    plot_losses({"RNN": history}, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert History.from_json(history.to_json()) == history
