"""A trained Llama in every format that it comes in: the tokens and logits that other programs get from it."""

import copy

import numpy as np
import pytest
import torch

import pyllm
from pyllm.data import SequenceLoader
from pyllm.engine.generation import generate_ids
from pyllm.engine.sampling import SamplingParams

GGUF = ["f32", "f16", "q8_0", "q5_0", "q4_0"]
EXACT = ["hf", "stories260K.bin", "stories260K_v1.bin", "gguf/stories260K-f32.gguf"]
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def stories(shared_data):
    return shared_data / "stories260K"


def logits(model, ids):
    with torch.no_grad():
        return model(torch.from_numpy(ids[:32].astype(np.int64))[None])[0]


def close(found, path):
    torch.testing.assert_close(found, torch.from_numpy(np.load(path)), rtol=0, atol=TOLERANCE)


def greedy(model, ids):
    """The 200 tokens that follow the first id."""
    steps = generate_ids(model, [[int(ids[0])]], SamplingParams(temperature=0.0), max_tokens=200)
    return [step[0] for step in steps]


@pytest.mark.parametrize("name", EXACT)
def test_greedy_tokens_and_logits_are_the_expected_ones(stories, name):
    model, _ = pyllm.load(stories / name)
    expected = np.load(stories / "expected_token_ids_n200.npy")
    close(logits(model, expected), stories / "logits_first32_transformers.npy")
    assert greedy(model, expected) == expected[1:].tolist()


@pytest.mark.parametrize("kind", GGUF)
def test_logits_of_each_gguf_are_the_recorded_ones(stories, kind):
    model, _ = pyllm.load(stories / "gguf" / f"stories260K-{kind}.gguf", dtype=torch.float32)
    ids = np.load(stories / "expected_token_ids_n200.npy")
    close(logits(model, ids), stories / "gguf" / f"logits_first32_{kind}.npy")
    if kind in ("f32", "f16"):  # quantised weights go on with other words
        assert greedy(model, ids) == ids[1:].tolist()


@pytest.mark.parametrize("kind", ["q8_0", "q5_0", "q4_0"])
def test_packed_weights_give_nearly_the_recorded_logits(stories, kind):
    """What is lost is the rounding of activations to 8 bits."""
    model, _ = pyllm.load(stories / "gguf" / f"stories260K-{kind}.gguf")
    assert len(model.quantized_weights()) == 17
    expected = torch.from_numpy(np.load(stories / "gguf" / f"logits_first32_{kind}.npy"))
    found = logits(model, np.load(stories / "expected_token_ids_n200.npy"))
    assert (found - expected).norm() < 0.015 * (expected - expected.mean()).norm()


def test_eight_and_four_bits_keep_the_perplexity_at_least_as_well_as_ggmls_formats(stories, shared_data):
    whole, tokenizer = pyllm.load(stories / "hf")
    text = (shared_data / "tinystories" / "minigpt_tinystories.txt").read_text(encoding="utf-8")
    held_out = SequenceLoader(tokenizer.encode(text[:30_000]), 4, 256)
    calibration = [torch.tensor(tokenizer.encode(text[-30_000:])[:8192]).view(32, 256)]
    exact = pyllm.test(whole, held_out).perplexity

    def worse(weights, **options):
        model = copy.deepcopy(whole)
        model.quantize(weights, **options)
        return pyllm.test(model, held_out).perplexity / exact - 1

    q8_0, q4_0 = (pyllm.test(pyllm.load(stories / "gguf" / f"stories260K-{kind}.gguf")[0], held_out).perplexity
                  / exact - 1 for kind in ("q8_0", "q4_0"))  # fmt: skip
    assert worse("int8") < max(q8_0, 0.002) and abs(worse("int8", calibration=calibration)) < 0.001
    assert worse("int4") < q4_0 and worse("int4", calibration=calibration) < 0.06


def test_every_format_brings_its_tokenizer(stories, tmp_path):
    text = (stories / "expected_noprompt_n200.txt").read_text(encoding="utf-8").strip("\n")
    (tmp_path / "m.bin").write_bytes((stories / "stories260K.bin").read_bytes())
    assert pyllm.load(tmp_path / "m.bin")[1] is None
    for name in (*EXACT, "gguf/stories260K-q4_0.gguf"):
        _, tokenizer = pyllm.load(stories / name)
        ids = np.load(stories / "expected_token_ids_n200.npy").tolist()
        assert tokenizer.decode(ids[1:]).strip() == text.strip(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_are_rounded_to_the_dtype_that_is_asked_for(stories, dtype):
    whole, _ = pyllm.load(stories / "hf")
    model, _ = pyllm.load(stories / "hf", dtype=dtype, device="cpu")
    theirs = dict(model.named_parameters())
    for name, parameter in whole.named_parameters():
        assert theirs[name].dtype == dtype and torch.equal(theirs[name], parameter.to(dtype))
    assert model.head.weight is model.embedding.weight
