"""One measurement of one provider, as JSON on the last line.

Usage: <venv>/bin/python providers.py PROVIDER MODEL_FOLDER KIND [--batch 8,32]

What is timed, by every provider alike, with 2 threads and random token ids:
  prefill   512 tokens, up to and including the first next token (tokens/s)
  decode    64 tokens after a prompt of 8, first token not counted (tokens/s)
  decodeN   24 tokens for each of N sequences together (tokens/s in all)
  load_s    from a path to a model that can run; peak_rss_mib of the process
"""

import argparse
import itertools
import json
import pathlib
import random
import resource
import statistics
import time

THREADS = 2
SEEDS = itertools.count()  # a new prompt every time: some peers keep prefixes


def ids(vocab, rows, columns):
    r = random.Random(next(SEEDS))
    return [[r.randrange(3, vocab) for _ in range(columns)] for _ in range(rows)]


def llama_cpp(folder, kind, vocab, batches, out):
    import llama_cpp as L

    L.llama_backend_init()
    silent = L.llama_log_callback(lambda *_: None)
    L.llama_log_set(silent, None)
    t = time.perf_counter()
    mp = L.llama_model_default_params()
    mp.n_gpu_layers = 0
    # Version 0.3.36 crashes where it repacks quantised weights for AMX.
    mp.use_extra_bufts = "amx_int8" not in pathlib.Path("/proc/cpuinfo").read_text()
    model = L.llama_model_load_from_file(str(folder / f"{kind}.gguf").encode(), mp)

    def context(rows):
        cp = L.llama_context_default_params()
        cp.n_ctx = max(1024, 64 * rows)
        cp.n_batch = cp.n_ubatch = 512
        cp.n_threads = cp.n_threads_batch = THREADS
        cp.n_seq_max = rows
        return L.llama_init_from_model(model, cp)

    ctx = context(1)
    out["load_s"] = time.perf_counter() - t

    def feed(ctx, rows, start):  # rows: one list of ids a sequence; logits for the last of each
        n = sum(map(len, rows))
        b = L.llama_batch_init(n, 0, 1)
        i = 0
        for s, row in enumerate(rows):
            for p, token in enumerate(row):
                b.token[i] = token
                b.pos[i] = start + p
                b.n_seq_id[i] = 1
                b.seq_id[i][0] = s
                b.logits[i] = p == len(row) - 1
                i += 1
        b.n_tokens = n
        if L.llama_decode(ctx, b):
            raise SystemExit("llama_decode failed")
        best = L.llama_get_logits_ith(ctx, i - 1)[0]
        L.llama_batch_free(b)
        return best

    def clear(ctx):
        L.llama_memory_clear(L.llama_get_memory(ctx), True)

    def prefill():
        clear(ctx)
        t = time.perf_counter()
        feed(ctx, ids(vocab, 1, 512), 0)
        return 512 / (time.perf_counter() - t)

    def decode(ctx, rows, n):
        clear(ctx)
        feed(ctx, ids(vocab, rows, 8), 0)
        step = ids(vocab, rows, 1)
        t = time.perf_counter()
        for i in range(n):
            feed(ctx, step, 8 + i)
        return rows * n / (time.perf_counter() - t)

    yield "prefill", prefill
    yield "decode", lambda: decode(ctx, 1, 64)
    for rows in batches:
        many = context(rows)
        yield f"decode{rows}", lambda many=many, rows=rows: decode(many, rows, 24)


def generating(generate, batches, prefill=None):
    """Providers with one generate(rows of ids, n) call: decode is the time of n + 1 tokens less that of one."""

    def decode(rows, n):
        x = ids(generate.vocab, rows, 8)
        generate(x, 1)
        t0 = time.perf_counter()
        generate(x, 1)
        t1 = time.perf_counter()
        generate(x, n + 1)
        t2 = time.perf_counter()
        return rows * n / ((t2 - t1) - (t1 - t0))

    def first():
        x = ids(generate.vocab, 1, 512)
        t = time.perf_counter()
        generate(x, 1)
        return 512 / (time.perf_counter() - t)

    yield "prefill", prefill or first
    yield "decode", lambda: decode(1, 64)
    for rows in batches:
        yield f"decode{rows}", lambda rows=rows: decode(rows, 24)


def ctranslate2(folder, kind, vocab, batches, out):
    import ctranslate2 as C

    t = time.perf_counter()
    g = C.Generator(
        str(folder / f"ct2-{kind}"), device="cpu", intra_threads=THREADS, inter_threads=1, compute_type=kind
    )
    out["load_s"] = time.perf_counter() - t

    def generate(rows, n):
        g.generate_batch(
            [[f"t{i}" for i in r] for r in rows],
            max_length=n,
            min_length=n,
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
            max_batch_size=0,
        )

    generate.vocab = vocab
    yield from generating(generate, batches)


def transformers(folder, kind, vocab, batches, out):
    import torch

    torch.set_num_threads(THREADS)
    from transformers import AutoModelForCausalLM

    t = time.perf_counter()
    m = AutoModelForCausalLM.from_pretrained(folder, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[kind]).eval()
    out["load_s"] = time.perf_counter() - t

    @torch.inference_mode()
    def generate(rows, n):
        x = torch.tensor(rows)
        m.generate(
            x,
            attention_mask=torch.ones_like(x),
            max_new_tokens=n,
            min_new_tokens=n,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )

    generate.vocab = vocab
    yield from generating(generate, batches)


def openvino(folder, kind, vocab, batches, out):
    import numpy as np
    import openvino as ov
    import openvino_genai as G

    t = time.perf_counter()
    p = G.LLMPipeline(str(folder / f"openvino-{kind}"), "CPU", INFERENCE_NUM_THREADS=THREADS)
    out["load_s"] = time.perf_counter() - t

    def generate(rows, n):
        x = np.array(rows, np.int64)
        c = G.GenerationConfig()
        c.max_new_tokens = c.min_new_tokens = n
        c.ignore_eos = True
        c.do_sample = False
        p.generate(G.TokenizedInputs(ov.Tensor(x), ov.Tensor(np.ones_like(x))), c)

    generate.vocab = vocab
    yield from generating(generate, batches)


def onnxruntime(folder, kind, vocab, batches, out):
    import numpy as np
    import onnxruntime_genai as G

    t = time.perf_counter()
    c = G.Config(str(folder / f"onnx-{kind}"))
    c.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
    m = G.Model(c)
    out["load_s"] = time.perf_counter() - t

    def generate(rows, n):
        x = np.array(rows, np.int32)
        p = G.GeneratorParams(m)
        p.set_search_options(
            max_length=x.shape[1] + n, min_length=x.shape[1] + n, batch_size=len(rows), do_sample=False
        )
        g = G.Generator(m, p)
        g.append_tokens(x)
        for _ in range(n):
            g.generate_next_token()

    generate.vocab = vocab
    yield from generating(generate, batches)


PROVIDERS = {
    "llama.cpp": llama_cpp,
    "ctranslate2": ctranslate2,
    "transformers": transformers,
    "openvino": openvino,
    "onnxruntime": onnxruntime,
}

if __name__ == "__main__":
    a = argparse.ArgumentParser()
    a.add_argument("provider")
    a.add_argument("folder", type=pathlib.Path)
    a.add_argument("kind")
    a.add_argument("--batch", default="")
    a = a.parse_args()
    c = json.loads((a.folder / "config.json").read_text())
    out = {}
    for name, measure in PROVIDERS[a.provider](
        a.folder, a.kind, c["vocab_size"], [int(b) for b in a.batch.split(",") if b], out
    ):
        measure()
        out[name] = round(statistics.median(measure() for _ in range(3)), 2)
    out["load_s"] = round(out["load_s"], 3)
    out["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(out))
