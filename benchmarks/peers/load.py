"""A mixed load for one provider: 200 requests of different sizes, at once or one after another. JSON on the last line.

Usage: <venv>/bin/python load.py PROVIDER MODEL_FOLDER KIND [--rate REQUESTS_A_SECOND] [--requests 200]

The requests are the same for all providers: random ids, prompts of 16 to 1,024 and answers of 16 to 256 tokens, none of
which ends sooner, as far as the model's context goes; greedy; 2 threads; at most 32 together. Without a rate all are
there at the beginning, with one they arrive by a Poisson process.
  tokens_s       generated tokens a second, from the first arrival to the last token
  seconds        that time
  first_s        the median time from a request's arrival to its first token; first95_s: for 95 % it is less
  load_s         from a path to a model that can run; peak_rss_mib of the process
Each provider does a smaller load first, which does not count. Needs the standard library alone, beside the provider.
"""

import argparse
import json
import pathlib
import time

from mixed import THREADS, TOGETHER, measured, peak_rss_mib, sizes, steps


def openvino(folder, kind):
    import numpy as np
    import openvino as ov
    import openvino_genai as G

    c = G.SchedulerConfig()
    c.max_num_seqs, c.cache_size, c.dynamic_split_fuse = TOGETHER, 2, True
    p = G.ContinuousBatchingPipeline(str(folder / f"openvino-{kind}"), c, "CPU", {"INFERENCE_NUM_THREADS": THREADS})

    def run(load):
        held = []

        def submit(r):
            g = G.GenerationConfig()
            g.max_new_tokens = g.min_new_tokens = r.tokens
            g.ignore_eos, g.do_sample = True, False
            held.append([r, p.add_request(len(held), ov.Tensor(np.array([r.ids], np.int64)), g), 0])

        def step(now):
            p.step()
            for entry in held:
                r, handle, count = entry
                while r.last is None and handle.can_read():
                    count += sum(len(o.generated_ids) for o in handle.read().values())
                    r.had(count, now())
                entry[2] = count

        steps(load, submit, p.has_non_finished_requests, step)

    return run


def ctranslate2(folder, kind):
    import ctranslate2 as C

    g = C.Generator(
        str(folder / f"ct2-{kind}"), device="cpu", intra_threads=THREADS, inter_threads=1, compute_type=kind
    )

    def batch(part, now):
        counts = [0] * len(part)

        def token(result):
            i = result.batch_id
            counts[i] += 1
            part[i].had(counts[i], now())
            return counts[i] >= part[i].tokens

        g.generate_batch(
            [[f"t{i}" for i in r.ids] for r in part],
            max_length=max(r.tokens for r in part),
            min_length=max(r.tokens for r in part),
            sampling_topk=1,
            include_prompt_in_result=False,
            end_token=[],
            callback=token,
        )

    def run(load):
        """Batches: it takes none into one that runs. Those of about one length together, as it does itself."""
        waiting = []

        def step(now):
            waiting.sort(key=lambda r: len(r.ids))
            part = [waiting.pop() for _ in range(min(TOGETHER, len(waiting)))]
            batch(part, now)

        steps(load, waiting.append, lambda: bool(waiting), step)

    return run


PROVIDERS = {"openvino": openvino, "ctranslate2": ctranslate2}


def main():
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument("provider", choices=PROVIDERS)
    a.add_argument("folder", type=pathlib.Path)
    a.add_argument("kind")
    a.add_argument("--rate", type=float, default=None)
    a.add_argument("--requests", type=int, default=200)
    a = a.parse_args()
    began = time.perf_counter()
    run = PROVIDERS[a.provider](a.folder, a.kind)
    loaded = time.perf_counter() - began
    out = measured(run, *sizes(a.folder), a.requests, a.rate)
    print(json.dumps(out | {"load_s": round(loaded, 3), "peak_rss_mib": peak_rss_mib()}))


if __name__ == "__main__":
    main()
