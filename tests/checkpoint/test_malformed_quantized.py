"""Wrong quantised weights in checkpoints of our own: what compiled code does with data from files is to pack these, so
that these tests run under the sanitizers too. All readers of files are in Python."""

import pytest
import torch

import pyllm
from pyllm.checkpoint import CheckpointError
from pyllm.quantization import FORMATS


def quantised(weights, group=32):
    """The config and the weights of a model."""
    torch.manual_seed(1)
    model = pyllm.Decoder(50, 64, 2, 4, num_kv_heads=2, context_length=64, intermediate_size=80)
    pyllm.quantize(model, weights, group=group)
    return model.config, dict(model.state_dict())


SPOILT = {
    "panels cut": lambda w: w.update({"head.weight.panels": w["head.weight.panels"][1:].clone()}),
    "groups cut": lambda w: w.update({"head.weight.panels": w["head.weight.panels"][:, 1:].clone()}),
    "groups of fewer bytes": lambda w: w.update({"head.weight.panels": w["head.weight.panels"][..., 1:].clone()}),
    "panels of another type": lambda w: w.update({"head.weight.panels": w["head.weight.panels"].long()}),
    "panels of two dimensions": lambda w: w.update({"head.weight.panels": w["head.weight.panels"].flatten(1)}),
    "panels of no bytes": lambda w: w.update({"head.weight.panels": w["head.weight.panels"][..., :0].clone()}),
    "panels missing": lambda w: w.pop("head.weight.panels"),
    "layout missing": lambda w: w.pop("head.weight.layout"),
    "another layout": lambda w: w.update({"head.weight.layout": torch.tensor([4, 32, 1, 0])}),
    "groups that there are not": lambda w: w.update({"head.weight.layout": torch.tensor([4, 16, 1, 0])}),
    "a flag that is none": lambda w: w.update({"head.weight.layout": torch.tensor([8, 32, 2, 0])}),
    "a layout of three": lambda w: w.update({"head.weight.layout": torch.tensor([8, 32, 1])}),
    "a layout of five": lambda w: w.update({"head.weight.layout": torch.tensor([8, 32, 1, 0, 50])}),
    "another number of rows": lambda w: w["head.weight.layout"][4].add_(1),
    "another number of columns": lambda w: w["head.weight.layout"][5].sub_(1),
    "a layout of another type": lambda w: w.update({"head.weight.layout": torch.tensor([8.0, 32.0, 1.0, 0.0])}),
    "a layer that is not there": lambda w: w.update({"tail.weight.panels": w["head.weight.panels"]}),
}


RECURRENT = {
    "panels cut": lambda w: w.update({"rnn.weight_hh_l0.panels": w["rnn.weight_hh_l0.panels"][1:].clone()}),
    "panels missing": lambda w: w.pop("rnn.weight_ih_l1.panels"),
    "layout missing": lambda w: w.pop("rnn.weight_hh_l1.layout"),
    "another layout": lambda w: w.update({"rnn.weight_ih_l0.layout": torch.tensor([4, 32, 1, 0])}),
    "a weight that is not there": lambda w: w.update({"rnn.weight_hh_l2.panels": w["rnn.weight_hh_l0.panels"]}),
    "a bias": lambda w: w.update({f"rnn.bias_hh_l0.{k}": w[f"rnn.weight_hh_l0.{k}"] for k in ("panels", "layout")}),
    "a weight twice": lambda w: w.update({"rnn.weight_hh_l0": torch.zeros(160, 40)}),
    "no weight": lambda w: [w.pop(f"rnn.weight_hh_l0.{k}") for k in ("panels", "layout")],
}


@pytest.mark.parametrize("spoil", RECURRENT)
def test_spoilt_weights_of_recurrent_layers_are_refused(spoil, tmp_path):
    model = pyllm.LanguageModel(50, 40, 2, cell="lstm")
    model.quantize("int8")
    weights = dict(model.state_dict())
    RECURRENT[spoil](weights)
    pyllm.checkpoint.save_checkpoint(tmp_path, model_type="recurrent", config=model.config, weights=weights)
    with pytest.raises(CheckpointError, match=r"rnn\."):
        pyllm.load(tmp_path)


@pytest.mark.parametrize("spoil", SPOILT)
def test_spoilt_quantised_weights_are_refused(spoil, tmp_path):
    config, weights = quantised("int8")
    SPOILT[spoil](weights)
    pyllm.checkpoint.save_checkpoint(tmp_path, model_type="decoder", config=config, weights=weights)
    with pytest.raises(CheckpointError):
        pyllm.load(tmp_path)


@pytest.mark.parametrize("group", [64, 256])
@pytest.mark.parametrize("weights", ["int4", "int4-min"])
def test_scales_that_are_no_multiples_of_a_unit_are_refused(weights, group, tmp_path):
    config, right = quantised(weights, group)
    name = "blocks.1.feed_forward.down.weight"
    layout = right[f"{name}.layout"]
    minimums = weights == "int4-min"
    for scale, minimum in ((1 + 2.0**-10, 0.0), (1.0, 1 + 2.0**-10), (float("nan"), 0.0), (1.0, float("inf"))):
        wrong, panels = dict(right), right[f"{name}.panels"].clone()
        scales = panels[..., -2 * (1 + minimums) * (panels.shape[2] // (16 + 2 * (1 + minimums))) :].view(torch.float16)
        of_each = scales.unflatten(-1, (1 + minimums, -1))
        of_each[:, :2, 0] = 0.125
        of_each[0, 1, 0, 3] = scale
        if minimums:
            of_each[0, 1, 1, 3] = minimum
        elif scale == 1.0:
            continue
        wrong[f"{name}.panels"] = panels
        pyllm.checkpoint.save_checkpoint(tmp_path, model_type="decoder", config=config, weights=wrong)
        assert layout[1] == group
        with pytest.raises(CheckpointError, match=rf"{name}.*whole multiples"):
            pyllm.load(tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("weights", FORMATS)
def test_any_bytes_of_quantised_weights_are_refused_or_harmless(weights, tmp_path):
    config, right = quantised(weights)
    names = [name for name in right if name.endswith(".panels")]
    refused = 0
    for case in range(20):
        name, wrong = names[torch.randint(len(names), ()).item()], dict(right)
        found = wrong[name]
        change = case % 4
        if change == 0:  # any bytes
            found = torch.randint(256, (found.nbytes,), dtype=torch.uint8).view(found.dtype).view(found.shape)
        elif change == 1:  # of another dtype
            found = found.view(torch.uint8 if found.dtype != torch.uint8 else torch.int8)
        elif change == 2:  # rows, or columns, more or less
            more = torch.randint(1, 9, (2,)).tolist()
            found = found.repeat(3, 3, 1)[: more[0], : more[1]].contiguous()
        else:  # another layer's
            found = wrong[names[torch.randint(len(names), ()).item()]]
        wrong[name] = found
        pyllm.checkpoint.save_checkpoint(tmp_path, model_type="decoder", config=config, weights=wrong)
        try:
            model, _ = pyllm.load(tmp_path)
            assert found.shape == right[name].shape and found.dtype == right[name].dtype
            assert model(torch.randint(50, (2, 9))).shape == (2, 9, 50)
        except CheckpointError as e:
            assert change and name.rpartition(".")[0] in str(e)
            refused += 1
    assert 8 <= refused < 20
