import json

import pytest
import torch

import pyllm
from pyllm.engine import PromptFileError, answer_file

TEXT = "the quick brown fox jumps over the lazy dog; 古池や蛙飛び込む水の音 🐸. " * 3
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
LINES = [
    {"prompt": "the quick", "id": "a", "temperature": 0},
    {"prompt": "古池", "max_tokens": 3, "seed": 5},
    {"messages": [{"role": "user", "content": "the"}], "id": 7, "top_k": 4, "stop": "o"},
    {"prompt": "the quick"},
    {"prompt": "x" * 300},
]


@pytest.fixture(scope="module", params=["llama", "lstm", "t5"])
def made(request):
    tokenizer = pyllm.Tokenizer.train("bpe:300", [TEXT])
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(3)
    if request.param == "lstm":
        return pyllm.LanguageModel(tokenizer.vocab_size, 16, 1), tokenizer
    if request.param == "t5":
        model = pyllm.EncoderDecoder(tokenizer.vocab_size, 16, 1, 2, context_length=200, start_id=tokenizer.eos_id)
        return model, tokenizer
    return pyllm.Decoder(tokenizer.vocab_size, 16, 2, 2, context_length=200), tokenizer


def write(path, lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


PARAMS = pyllm.SamplingParams(temperature=1.1, seed=3)


def test_a_line_that_asks_for_too_much_ends_alone(made, tmp_path):
    model, tokenizer = made
    if model.context_length is None:
        pytest.skip("a model without a limited context has room for it")
    file, out = (
        write(tmp_path / "in.jsonl", [{"prompt": "the", "max_tokens": 10**12}, LINES[0]]),
        tmp_path / "out.jsonl",
    )
    answer_file(model, tokenizer, file, out, PARAMS, max_tokens=20)
    assert "do not fit the model's context of 200" in read(out)[0]["error"]
    assert read(out)[1]["text"] == pyllm.generate(model, tokenizer, "the quick", temperature=0, max_tokens=20)


def test_each_line_gets_what_it_asks_for(made, tmp_path):
    model, tokenizer = made
    file, out = write(tmp_path / "in.jsonl", [*LINES[:2], "", *LINES[2:]]), tmp_path / "out.jsonl"
    told = []
    reasons = answer_file(model, tokenizer, file, out, PARAMS, max_tokens=20, batch_size=2,
                          progress=lambda *n: told.append(n))  # fmt: skip
    found = read(out)
    assert [f["line"] for f in found] == [1, 2, 4, 5, 6] and told == [(n, 5) for n in range(6)]
    assert sum(reasons.values()) == 5 and reasons.get("error", 0) == (model.context_length is not None)
    assert [f.get("id") for f in found] == ["a", None, 7, None, None]
    assert [f["seed"] for f in found] == [3, 5, 6, 7, 8]
    options = [{"temperature": 0, "max_tokens": 20, "seed": 3}, {"temperature": 1.1, "max_tokens": 3, "seed": 5}, None,
               {"temperature": 1.1, "max_tokens": 20, "seed": 7}]  # fmt: skip
    for given, answer, own in zip(LINES, found, options, strict=False):
        if own is not None:
            assert answer["text"] == pyllm.generate(model, tokenizer, given["prompt"], **own)
            assert answer["tokens"] <= own["max_tokens"] and answer["prompt"] == given["prompt"]
    chat = TEMPLATE.replace("{% for m in messages %}{{ m.role }}", "user").replace("{{ m.content }}", "the")
    assert found[2]["text"] == pyllm.generate(model, tokenizer, chat.replace("{% endfor %}", ""), temperature=1.1,
                                              max_tokens=20, seed=6, top_k=4, stop="o")  # fmt: skip
    if model.context_length is not None:
        assert found[4]["reason"] == "error" and "do not fit the model's context of 200" in found[4]["error"]


def test_an_interruption_is_gone_on_from(made, tmp_path):
    model, tokenizer = made
    file = write(tmp_path / "in.jsonl", LINES)
    options = {"params": PARAMS, "max_tokens": 20, "batch_size": 2}
    answer_file(model, tokenizer, file, whole := tmp_path / "whole.jsonl", **options)
    for after in range(4):
        out = tmp_path / f"{after}.jsonl"

        def interrupt(done, total, after=after):
            if done == after:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            answer_file(model, tokenizer, file, out, progress=interrupt, **options)
        kept = read(out)
        assert len(kept) == after
        with open(out, "a") as f:
            f.write('{"line": 5, "prompt": "xxx')  # cut short
        told = []
        answer_file(model, tokenizer, file, out, progress=lambda *n, told=told: told.append(n), **options)
        assert told[0] == (after, 5) and out.read_bytes() == whole.read_bytes()
    before = whole.stat().st_mtime_ns
    answer_file(model, tokenizer, file, whole, **options)
    assert whole.stat().st_mtime_ns == before


@pytest.mark.parametrize(("line", "message"), [
    ('{"prompt": "a"', "must be JSON"),
    ('["a"]', "must be a JSON object"),
    ('{"prompt": "a", "prompt": "b"}', "twice"),
    ('{"prompt": "a", "min_p": NaN}', "must be finite"),
    ({}, "either prompt or messages"),
    ({"prompt": "a", "messages": []}, "either prompt or messages"),
    ({"prompt": "a", "temprature": 1}, "'temprature'"),
    ({"prompt": 1}, "prompt must be a text, but is 1"),
    ({"prompt": "\ud800"}, "valid Unicode"),
    ({"messages": "a"}, "list of objects"),
    ({"messages": [{"content": {}}, 1]}, "list of objects"),
    ({"prompt": "a", "id": 1.5}, "id must be"),
    ({"prompt": "a", "id": "first"}, "the id 'first' is that of line 1"),
    ({"prompt": "a", "temperature": "hot"}, "temperature must be a number, but is 'hot'"),
    ({"prompt": "a", "temperature": -1}, "temperature must be finite and 0 or more"),
    ({"prompt": "a", "top_k": 1.5}, "top_k must be a whole number, but is 1.5"),
    ({"prompt": "a", "seed": True}, "seed must be a whole number"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens must be at least 1, but got 0"),
    ({"prompt": "a", "stop": [""]}, "stop must be a text or a list of them"),
])  # fmt: skip
def test_a_malformed_line_is_named_before_anything_is_run(line, message, made, tmp_path):
    file, out = write(tmp_path / "in.jsonl", [{"prompt": "a", "id": "first"}, line]), tmp_path / "out.jsonl"
    with pytest.raises(PromptFileError) as error:
        answer_file(*made, file, out)
    assert f"{file}, line 2" in str(error.value) and message in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize(("line", "message"), [
    ("nothing", "must be JSON"),
    ({"line": 1, "prompt": "other", "text": "", "reason": "stop"}, "is no answer to a line of"),
    ({"line": 1, "prompt": "a", "id": 1, "text": "", "reason": "stop"}, "is no answer to a line of"),
    ({"line": 3, "prompt": "a", "text": "", "reason": "stop"}, "is no answer to a line of"),
    ({"line": True, "prompt": "a", "text": "", "reason": "stop"}, "is no answer to a line of"),
    ({"line": 1, "prompt": "a", "text": ""}, "must have text and reason"),
    ({"line": 2, "prompt": "b", "text": "", "reason": "stop"}, "answers line 2 of .* once more"),
])  # fmt: skip
def test_answers_to_other_prompts_are_refused_and_left_alone(line, message, made, tmp_path):
    file = write(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b"}])
    out = write(tmp_path / "out.jsonl", [{"line": 2, "prompt": "b", "text": "", "reason": "stop"}, line])
    before = out.read_bytes()
    with pytest.raises(PromptFileError, match=f"line 2.* {message}"):
        answer_file(*made, file, out)
    assert out.read_bytes() == before
    with pytest.raises(ValueError, match="must be two files"):
        answer_file(*made, file, file)
