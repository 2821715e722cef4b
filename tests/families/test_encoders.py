"""Each family of encoders with each head against transformers: small random models saved there, loaded here, and saved
back."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from families.parity import (
    check_agrees,
    check_leaves_out_the_same,
    difference,
    gradients_under_their_names,
    load,
    loaded_there,
    made,
)
from safetensors.torch import load_file, save_file

import pyllm
from pyllm.checkpoint import CheckpointError
from pyllm.families import FAMILIES

SIZES = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "max_position_embeddings": 66, "initializer_range": 0.2}  # fmt: skip
DISTILBERT = {"vocab_size": 61, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64,
              "initializer_range": 0.2}  # fmt: skip
FAMILY = {"Bert": ("bert", SIZES), "Roberta": ("roberta", SIZES | {"type_vocab_size": 1}),
          "DistilBert": ("distilbert", DISTILBERT), "XLMRoberta": ("xlm-roberta", SIZES),
          "Camembert": ("camembert", SIZES)}  # fmt: skip
NAMES = {0: "red", 1: "green", 2: "blue"}
LABELS = {"id2label": NAMES, "label2id": {name: i for i, name in NAMES.items()}}
TASKS = {"Model": {}, "ForMaskedLM": {}, "ForSequenceClassification": LABELS, "ForTokenClassification": LABELS,
         "ForQuestionAnswering": {}}  # fmt: skip
THREE = ("Bert", "Roberta", "DistilBert")
CASES = {f"{family}{task}": (f"{family}{task}", {}) for family in THREE for task in TASKS} | {
    "another activation": ("BertForMaskedLM", {"hidden_act": "gelu_new"}),
    "untied": ("BertForMaskedLM", {"tie_word_embeddings": False}),
    "relu": ("DistilBertForMaskedLM", {"activation": "relu", "tie_word_embeddings": False}),
    "untied RoBERTa": ("RobertaForMaskedLM", {"tie_word_embeddings": False}),
    "CamembertForTokenClassification": ("CamembertForTokenClassification", {}),
    "XLMRobertaForSequenceClassification": ("XLMRobertaForSequenceClassification", {}),
    "padded with 0": ("RobertaModel", {"pad_token_id": 0, "type_vocab_size": 3}),
}


def make(name, settings, folder):
    family = next(f for f in FAMILY if name.startswith(f))
    model_type, sizes = FAMILY[family]
    task = name.removeprefix(family)
    return made(getattr(transformers, name), model_type, sizes | TASKS[task] | settings, folder)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family")
    theirs = make(*CASES[request.param], folder)
    ours, family = load(folder)
    return SimpleNamespace(case=request.param, theirs=theirs, ours=ours, family=family, folder=folder,
                           segmented=family.model_type == "bert", head=ours.config["head"])  # fmt: skip


def output_of(theirs, ids, segments=None, **inputs):
    """What our model of the same kind gives."""
    out = theirs(ids, **inputs, **({} if segments is None else {"token_type_ids": segments}))
    if "start_logits" in out:
        return torch.stack((out.start_logits, out.end_logits), -1)
    return out.logits if "logits" in out else out.last_hidden_state


@torch.no_grad()
def test_outputs_agree(pair):
    ids = torch.randint(3, 61, (16, 50))
    segments = torch.randint(2, (16, 50)) if pair.segmented else None
    sdpa = type(pair.theirs).from_pretrained(pair.folder, attn_implementation="sdpa").eval()
    eager, other = (output_of(m, ids, segments) for m in (pair.theirs, sdpa))
    check_agrees(pair.case, pair.ours(ids, segments=segments), eager, other)
    assert pair.ours.labels == (list(NAMES.values()) if pair.head in ("sequence", "tokens") else None)
    assert not pair.ours.training and pair.ours.vocab_size == 61


def targets_for(head, ids):
    """Targets, some of which do not count, and how transformers is given them."""
    if head == "sequence":
        targets = torch.randint(3, (len(ids),))
        return targets, {"labels": targets}
    if head == "span":
        targets = torch.randint(ids.shape[1], (len(ids), 2))
        return targets, {"start_positions": targets[:, 0], "end_positions": targets[:, 1]}
    targets = torch.randint(61 if head == "masked_lm" else 3, ids.shape)
    targets[:, ::3] = -100
    return targets, {"labels": targets}


def test_losses_and_gradients_agree(pair):
    ids = torch.randint(3, 61, (3, 24))
    if pair.head is None:
        direction = torch.randn(3, 24, 32)
        loss, expected = ((direction * y).sum() for y in (pair.ours(ids), output_of(pair.theirs, ids)))
        with pytest.raises(ValueError, match="only an encoder with a head has a loss"):
            pair.ours.loss(ids, ids)
    else:
        targets, named = targets_for(pair.head, ids)
        loss, expected = pair.ours.loss(ids, targets), pair.theirs(ids, **named).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    found, compared = gradients_under_their_names(pair.ours, pair.family), 0
    largest = max(p.grad.abs().max().item() for p in pair.theirs.parameters() if p.grad is not None)
    for name, parameter in pair.theirs.named_parameters():
        name = next((n for n in (name, f"cls.predictions.decoder.{name.rpartition('.')[2]}",
                                 f"lm_head.decoder.{name.rpartition('.')[2]}") if n in found), None)  # fmt: skip
        if name is not None and parameter.grad is not None:
            scale = parameter.grad.abs().max().item() + 0.01 * largest  # those of key's bias are all rounding
            assert difference(found[name], parameter.grad) <= 3e-5 * scale, name
            compared += 1
    assert compared >= 36
    pair.theirs.zero_grad()
    pair.ours.zero_grad()


def test_training_drops_the_same(pair):
    ids = torch.randint(3, 61, (3, 20))
    check_leaves_out_the_same(pair.ours, pair.theirs, lambda: pair.ours(ids), lambda: output_of(pair.theirs, ids))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_and_batches_do_not_change_the_bits(pair, dtype):
    ours, _ = load(pair.folder, dtype)
    rows = [torch.randint(3, 61, (n,)) for n in (23, 5, 14, 1)]
    segments = [torch.randint(2, row.shape) for row in rows] if pair.segmented else [None] * 4
    alone = [ours(row[None], segments=None if s is None else s[None])[0] for row, s in zip(rows, segments, strict=True)]
    kinds = [[torch.ones_like(row) for row in rows], rows, segments]

    def padded(side, value=1):
        return [None if k[0] is None else torch.nn.utils.rnn.pad_sequence(k, True, v, side)
                for k, v in zip(kinds, (0, value, 1), strict=True)]  # fmt: skip

    mask, ids, kind = padded("right", 7)
    ways = [(mask, ours(ids, segments=kind, **m)) for m in ({"lengths": mask.sum(1)}, {"attention_mask": mask})]
    mask, ids, kind = padded("left")
    ways.append((mask, ours(ids, attention_mask=mask, segments=kind)))
    for mask, found in ways:
        for one, real, expected in zip(found, mask == 1, alone, strict=True):
            assert torch.equal(one if pair.head == "sequence" else one[real], expected)
            assert pair.head != "span" or one[~real].isneginf().all()


@torch.no_grad()
def test_padding_is_as_in_transformers(pair):
    rows = [torch.randint(3, 61, (n,)) for n in (23, 5, 14)]
    padding = pair.ours.config["padding_id"]
    for side in ("right", "left"):
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, padding, side)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, side)
        if side == "left" and pair.head == "sequence":
            continue  # transformers takes the first vector, of padding
        # RoBERTa counts places without padding, the others as they are told
        places = {} if pair.ours.config["skip_padding"] else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
        found, theirs = pair.ours(ids, attention_mask=mask), output_of(pair.theirs, ids, attention_mask=mask, **places)
        if pair.head != "sequence":
            found, theirs = found[mask == 1], theirs[mask == 1]
        assert difference(found, theirs) <= 1e-5 * theirs.abs().max().item()


@torch.no_grad()
def test_what_is_exported_loads_there_with_equal_outputs(pair, tmp_path):
    ours, _ = pyllm.load(pair.folder)
    folder = tmp_path / "exported"
    pyllm.export(ours, folder)
    ids = torch.randint(3, 61, (2, 40))
    again, _ = pyllm.load(folder)
    assert again.config == ours.config and torch.equal(again(ids), ours(ids))
    # what transformers itself writes but does not use where nothing is tied
    unused = {"cls.predictions.bias", "lm_head.bias"} if "untied" in pair.case else ()
    theirs = loaded_there(type(pair.theirs), folder, unused)
    assert theirs.config.id2label == pair.theirs.config.id2label
    assert torch.equal(output_of(theirs, ids), output_of(pair.theirs, ids))


@torch.no_grad()
def test_our_own_checkpoints(pair, tmp_path):
    pyllm.save(pair.ours, tmp_path)
    again, _ = pyllm.load(tmp_path)
    ids = torch.randint(3, 61, (2, 40))
    assert again.config == pair.ours.config and torch.equal(again(ids), pair.ours(ids))


def test_every_way_of_running_gives_the_same_bits(pair):
    assert pyllm.check(pair.ours) == []


@torch.no_grad()
def test_poolers_are_those_of_transformers(tmp_path):
    for name in ("BertModel", "RobertaModel"):
        theirs = make(name, {}, tmp_path / name)
        ours, _ = load(tmp_path / name)
        ids = torch.randint(3, 61, (4, 20))
        expected = theirs(ids).pooler_output
        assert difference(ours.embed(ids, pooling="pooler", normalize=False), expected) <= 1e-5


def test_checkpoints_as_they_are_found(tmp_path):
    """Names from before transformers 2, weights that the model has no place for, and configs that say too little."""
    make("BertForMaskedLM", {}, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = load_file(tmp_path / "model.safetensors")
    ids = torch.randint(3, 61, (2, 9))
    expected, _ = pyllm.load(tmp_path)

    def model(tensors, **changes):
        save_file(tensors, tmp_path / "model.safetensors")
        said = {k: v for k, v in (config | changes).items() if v is not None}
        (tmp_path / "config.json").write_text(json.dumps(said))
        return pyllm.load(tmp_path)[0]

    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
           for n, t in tensors.items()}  # fmt: skip
    old |= {"bert.embeddings.position_ids": torch.arange(66), "bert.pooler.dense.weight": torch.ones(32, 32),
            "bert.pooler.dense.bias": torch.ones(32), "cls.seq_relationship.weight": torch.ones(2, 32),
            "cls.seq_relationship.bias": torch.ones(2),
            "cls.predictions.decoder.weight": tensors["bert.embeddings.word_embeddings.weight"].clone(),
            "cls.predictions.decoder.bias": tensors["cls.predictions.bias"].clone()}  # fmt: skip
    for named in (["BertForMaskedLM"], ["BertForPreTraining"], None):
        assert torch.equal(model(old, architectures=named)(ids), expected(ids))
    bare = {n.removeprefix("bert."): t for n, t in tensors.items() if n.startswith("bert.")}
    body = model(bare)
    assert body.head is None and body.pooler is None and torch.equal(body(ids), expected.hidden(ids))
    with pytest.raises(CheckpointError, match=r"missing: classifier\.weight"):
        model(tensors, architectures=["BertForTokenClassification"])
    with pytest.raises(CheckpointError, match="architectures must name one of BertModel, BertForMaskedLM"):
        model(tensors, architectures=["BertForMultipleChoice"])


@pytest.mark.parametrize(
    ("family", "setting", "message"),
    [
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type must be 'absolute'"),
        ("roberta", {"position_embedding_type": "relative_key_query"}, "position_embedding_type must be 'absolute'"),
        ("bert", {"is_decoder": True}, "is_decoder must be False"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention must be False"),
        ("bert", {"pruned_heads": {"0": [1]}}, "pruned_heads must be {}"),
        ("bert", {"hidden_act": "mish"}, "hidden_act must be one of gelu"),
        ("distilbert", {"activation": "mish"}, "activation must be one of gelu"),
        ("bert", {"hidden_dropout_prob": 1.5}, "hidden_dropout_prob must be a number from 0 to 1"),
        ("bert", {"pad_token_id": -1}, "pad_token_id must be a whole number from 0"),
        ("roberta", {"pad_token_id": 65}, "max_position_embeddings must be above pad_token_id"),
        ("roberta", {"hidden_act": "relu", "architectures": ["RobertaForMaskedLM"]}, "hidden_act must be 'gelu'"),
        ("bert", {"architectures": ["BertForTokenClassification"], "id2label": {"1": "a"}}, "id2label must name"),
        ("bert", {"architectures": ["BertForTokenClassification"], "id2label": {"0": 5}}, "names that are strings"),
        ("bert", {"architectures": ["BertForTokenClassification"], "num_labels": 10**9}, "num_labels must be up to"),
        ("bert", {"architectures": ["BertForSequenceClassification"], "problem_type": "x"}, "problem_type must be one"),
    ],
)
def test_configs_that_are_refused(family, setting, message):
    sizes = DISTILBERT if family == "distilbert" else SIZES
    with pytest.raises(ValueError, match=message):
        FAMILIES[family].config(sizes | setting)
