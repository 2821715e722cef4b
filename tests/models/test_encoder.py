"""Encoders of our own making: pooling, heads, their losses, and what an encoder refuses."""

import pytest
import torch
from torch.nn import functional as F

import pyllm
from pyllm.models.heads import HEADS

LABELS = ["no", "yes", "maybe"]


def make(head=None, **settings):
    if head in ("sequence", "tokens"):
        settings.setdefault("labels", LABELS)
    model = pyllm.Encoder(31, 24, 2, 4, context_length=40, head=head, **settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def padded(*lengths):
    rows = [torch.randint(1, 31, (n,)) for n in lengths]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(lengths), rows


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pooling(dtype, threads):
    model = make(pooler=True).to(dtype)
    ids, lengths, rows = padded(17, 1, 40, 6)
    h = model(ids, lengths=lengths).float()
    real = (torch.arange(40) < lengths[:, None])[..., None]
    expected = {
        "mean": (h * real).sum(1) / real.sum(1),
        "max": h.masked_fill(~real, -1e30).amax(1),
        "cls": h[:, 0],
        "pooler": torch.tanh(F.linear(h[:, 0], model.pooler.weight.float(), model.pooler.bias.float())),
    }
    left = ids.roll(1, 1)[:, :1].new_zeros(4, 40)
    for row, ids_of in zip(left, rows, strict=True):
        row[40 - len(ids_of) :] = ids_of
    for pooling, vectors in expected.items():
        for normalize in (False, True):
            found = model.embed(ids, lengths, pooling=pooling, normalize=normalize)
            torch.testing.assert_close(found.float(), F.normalize(vectors) if normalize else vectors,
                                       **({"rtol": 0.02, "atol": 0.02} if dtype == torch.bfloat16 else {}))  # fmt: skip
            options = {"pooling": pooling, "normalize": normalize}
            assert torch.equal(found, torch.cat([model.embed(row[None], **options) for row in rows]))
            assert torch.equal(found, model.embed(left, attention_mask=left != 0, **options))
            threads(1)
            assert torch.equal(found, model.embed(ids, attention_mask=ids != 0, **options))
            threads(2)


def test_a_text_of_mean_pooling_can_be_learnt():
    model = make()
    ids, lengths, _ = padded(9, 4)
    parameters = [p for p in model.parameters() if p.requires_grad]
    real = (torch.arange(9) < lengths[:, None])[..., None]
    by_hand = F.normalize((model(ids, lengths=lengths) * real).sum(1) / lengths[:, None])
    direction = torch.randn(2, 24)
    ours, expected = (
        torch.autograd.grad((y * direction).sum(), parameters) for y in (model.embed(ids, lengths), by_hand)
    )
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
@pytest.mark.parametrize("said", [True, False])
def test_the_problems_of_sequences(problem, said):
    one = problem == "regression" and not said
    model = make("sequence", problem=problem if said else None, labels=["score"] if one else LABELS)
    ids, lengths, _ = padded(9, 4)
    scores = model(ids, lengths=lengths)
    if problem == "single_label_classification":
        targets = torch.tensor([2, -100])
        expected = F.cross_entropy(scores, targets)
    elif problem == "regression":
        targets = torch.randn(2) if one else torch.randn(2, 3)
        expected = F.mse_loss(scores, targets.view_as(scores))
    else:
        targets = torch.randint(2, (2, 3)).float()
        expected = F.binary_cross_entropy_with_logits(scores, targets)
    torch.testing.assert_close(model.loss(ids, targets, lengths=lengths), expected)
    if problem != "single_label_classification":
        with pytest.raises(ValueError, match=f"targets of {problem} must have shape"):
            model.loss(ids, targets[:1])
        with pytest.raises(ValueError, match="label_smoothing must be 0"):
            model.loss(ids, targets, label_smoothing=0.1)


@pytest.mark.parametrize("head", ["tokens", "masked_lm", "span"])
def test_padding_has_no_part_in_a_loss(head):
    model = make(head)
    ids, lengths, rows = padded(9, 4, 6)
    targets = torch.randint(4, (3, 2)) if head == "span" else torch.randint(3, ids.shape)
    alone = [model.loss(row[None], t[None, : len(row)]) for row, t in zip(rows, targets, strict=True)]
    counts = torch.ones(3) if head == "span" else lengths
    loss = model.loss(ids, targets, lengths=lengths)
    torch.testing.assert_close(loss, (torch.stack(alone) * counts).sum() / counts.sum())
    assert torch.equal(loss, model.loss(ids, targets, attention_mask=ids != 0))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_targets_of_spans_that_do_not_count():
    model = make("span")
    ids, _, _ = padded(9, 9)
    begin, end = model(ids).unbind(2)
    loss = model.loss(ids, torch.tensor([[1, 3], [-100, 4]]))
    expected = (F.cross_entropy(begin[:1], torch.tensor([1])) + F.cross_entropy(end, torch.tensor([3, 4]))) / 2
    torch.testing.assert_close(loss, expected)
    with pytest.raises(IndexError, match="9"):
        model.loss(ids, torch.tensor([[1, 9], [1, 1]]))


@pytest.mark.parametrize("head", HEADS)
def test_another_head_on_the_same_body(head, tmp_path):
    model = make(pooler=True).bfloat16()
    ids, lengths, _ = padded(9, 4)
    other = model.with_head(head, LABELS if head in ("sequence", "tokens") else None)
    assert torch.equal(other.with_head(None)(ids), model(ids)) and not other.training
    assert other.embedding.weight is model.embedding.weight and other.pooler is None
    assert all(p.dtype == torch.bfloat16 and not p.is_meta for p in other.parameters())
    if head == "masked_lm":
        assert other.head.decoder.weight is model.embedding.weight
    if head == "sequence":
        assert torch.equal(other.head.pooler.weight, model.pooler.weight)
    pyllm.export(other, tmp_path / "exported")
    pyllm.save(other, tmp_path / "saved")
    for folder in ("exported", "saved"):
        again, _ = pyllm.load(tmp_path / folder)
        assert torch.equal(again(ids, lengths=lengths), other(ids, lengths=lengths)) and again.labels == other.labels


def test_training_on_padded_batches(tmp_path):
    """Which of two ids occurs more often: a sequence of any length has a label."""
    torch.manual_seed(3)
    model = pyllm.Encoder(5, 16, 1, 2, context_length=12, head="sequence", labels=["twos", "threes"], dropout=0.1)
    batches = []
    for _ in range(60):
        lengths = torch.randint(3, 13, (16,))
        ids = torch.randint(2, 4, (16, 12))
        targets = (torch.where(torch.arange(12) < lengths[:, None], ids - 2.5, 0).sum(1) > 0).long()
        batches.append(({"ids": ids, "lengths": lengths}, targets))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    history = pyllm.train(model, batches, optimizer, folder=tmp_path, validation=batches[:5], progress=False)
    assert sum(history.losses[-10:]) / 10 < 0.35 and history.validation[-1][1].accuracy > 0.85
    again, _ = pyllm.load(tmp_path)
    assert torch.equal(again(**batches[0][0]), model.eval()(**batches[0][0]))
    assert pyllm.check(model, length=12) == []


def test_what_does_not_apply_to_an_encoder():
    model = make("masked_lm")
    tokenizer = pyllm.Tokenizer.train("char", "abc")
    for run in (lambda: model.new_state(1), lambda: pyllm.generate(model, tokenizer, "a")):
        with pytest.raises(NotImplementedError, match="an encoder sees the whole of a text at once"):
            run()
    with pytest.raises(ValueError, match="are the next tokens, which Encoder sees"):
        pyllm.test(model, pyllm.data.SequenceLoader(list(range(20)), 1, 4))
    with pytest.raises(ValueError, match="state must be None"):
        model(torch.ones(1, 3, dtype=torch.int64), object())


def test_errors():
    for settings, message in [
        ({"head": "lm"}, "head must be None or one of sequence, tokens, masked_lm, span, but got 'lm'"),
        ({"head": "tokens"}, "labels must be given for the heads"),
        ({"labels": LABELS}, "labels must be given for the heads"),
        ({"problem": "binary"}, "problem must be None or one of single_label_classification"),
        ({"head_activation": "gelu"}, "head_activation must be one of tanh, relu"),
        ({"activation": "mish"}, "activation must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            pyllm.Encoder(31, 24, 1, 4, **settings)
    model, ids = make("tokens", num_segments=0), torch.ones(2, 5, dtype=torch.int64)
    for run, message in [
        (lambda: model(ids[0]), r"ids must have shape \(B, T\) with T from 1 to 40"),
        (lambda: model(ids[:, :0]), r"but got \(2, 0\)"),
        (lambda: model(ids.repeat(1, 9)), r"but got \(2, 45\)"),
        (lambda: model(ids, lengths=torch.tensor([5, 0])), "must have at least 1 id that is no padding, but got 0"),
        (lambda: model(ids, lengths=torch.tensor([5, 6])), "key_lengths must be 0 to 5, but got 6"),
        (lambda: model(ids, attention_mask=ids[:, :3]), "attention_mask must have shape"),
        (lambda: model(ids, attention_mask=torch.tensor([[1, 0, 1, 1, 1]] * 2)), "ones next to each other"),
        (lambda: model(ids, lengths=ids[:, 0], attention_mask=ids), "must not both be given"),
        (lambda: model(ids, segments=ids), "segments must not be given"),
        (lambda: model.loss(ids, ids[:, :3]), r"targets must have shape \(2, 5\), but got \(2, 3\)"),
        (lambda: model.embed(ids, pooling="sum"), "pooling must be one of mean, max, cls, but got 'sum'"),
        (lambda: model.embed(ids, pooling="pooler"), "pooling must be one of mean, max, cls, but got 'pooler'"),
        (lambda: make().loss(ids, ids), "only an encoder with a head has a loss"),
        (lambda: make("span").loss(ids, ids), r"targets must have shape \(2, 2\), but got \(2, 5\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            run()
    with pytest.raises(IndexError, match="31"):
        model(ids + 30)
    with pytest.raises(IndexError, match="2"):
        make()(ids, segments=ids + 1)
    with pytest.raises(IndexError, match="3"):
        model.loss(ids, ids + 2)
