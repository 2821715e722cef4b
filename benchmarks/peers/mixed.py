"""The requests of the mixed load, and what is measured of those who answer them; see load.py."""

import json
import random
import resource
import statistics
import time

THREADS, TOGETHER, SEED = 2, 32, 7


class Request:
    def __init__(self, ids, tokens, arrival):
        self.ids, self.tokens, self.arrival = ids, tokens, arrival
        self.first = self.last = None  # seconds after the beginning

    def arrived(self, now):
        return self.arrival <= now

    def had(self, count, now):
        """So many tokens of it are there."""
        if count and self.first is None:
            self.first = now
        if count >= self.tokens:
            self.last = now


def requests(vocabulary, context, count=200, rate=None):
    """Those of the load, in the order of their arrival."""
    r, at, made = random.Random(SEED), 0.0, []
    for _ in range(count):
        length, tokens = r.randint(16, 1024), r.randint(16, 256)
        length = min(length, context - tokens)
        at += r.expovariate(1.0)
        made.append(Request([r.randrange(3, vocabulary) for _ in range(length)], tokens, at / rate if rate else 0.0))
    return made


def measured(run, vocabulary, context, count, rate):
    """What a provider's `run`, which answers a load and notes when, makes of it."""
    run(requests(vocabulary, context, 8))
    load = requests(vocabulary, context, count, rate)
    run(load)
    waited = sorted(r.first - r.arrival for r in load)
    seconds = max(r.last for r in load) - load[0].arrival
    return {
        "tokens_s": round(sum(r.tokens for r in load) / seconds, 2),
        "seconds": round(seconds, 3),
        "first_s": round(statistics.median(waited), 3),
        "first95_s": round(waited[int(0.95 * (len(waited) - 1))], 3),
    }


def peak_rss_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def steps(load, submit, running, step):
    """The loop of a provider that takes requests while it runs: submits those that have arrived, and steps."""
    began, coming = time.perf_counter(), list(load)
    while coming or running():
        while coming and coming[0].arrived(time.perf_counter() - began):
            submit(coming.pop(0))
        if running():
            step(lambda: time.perf_counter() - began)
        elif coming:
            time.sleep(max(0.0, coming[0].arrival - (time.perf_counter() - began)))


def sizes(folder):
    c = json.loads((folder / "config.json").read_text())
    return c["vocab_size"], c.get("max_position_embeddings", c.get("n_positions"))
