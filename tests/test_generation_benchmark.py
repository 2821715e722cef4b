"""The race against other engines: our part of it, and what is kept and shown of it."""

import dataclasses
import math

import pytest

import pyllm
from pyllm.benchmarks import generation, mixed_load, provider
from pyllm.benchmarks.peers.mixed import measured, requests


@pytest.mark.parametrize("bits", ["32", "16", "8", "4"])
def test_our_part(tmp_path, bits, threads):
    threads(2)
    model = pyllm.Decoder(50, 32, 1, 2, context_length=600)
    pyllm.export(model, tmp_path, verify=False)
    found = provider.measure(tmp_path, bits, [2])
    assert list(found) == ["load_s", "prefill", "decode", "decode2", "peak_rss_mib"]
    assert all(figure > 0 for figure in found.values())
    kept = [] if bits == "32" else [f"pyllm-{provider.CONVERSIONS[bits][0]}"]
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == kept


@pytest.mark.parametrize("rate", [None, 1000.0])
def test_our_part_in_a_mixed_load(rate):
    made = requests(50, 300, 30, rate)
    assert [r.ids for r in made] == [r.ids for r in requests(50, 300, 30)]
    assert all(len(r.ids) + r.tokens <= 300 and len(r.ids) > 15 for r in made)
    assert [r.arrival for r in made] == sorted(r.arrival for r in made) and (made[-1].arrival > 0) == (rate is not None)
    engine = pyllm.Engine(pyllm.Decoder(50, 16, 1, 2, context_length=600), max_sequences=4)
    found = measured(mixed_load.runner(engine), 50, 300, 6, rate)
    assert list(found) == ["tokens_s", "seconds", "first_s", "first95_s"] and all(f > 0 for f in found.values())


def result(**changes):
    usual = {"date": "2026-01-01", "device": "a processor", "isa": "avx2", "threads": 2, "pyllm": "0.1.0",
             "shape": "15m", "bits": 8, "measure": "decode", "provider": "pyllm", "median": 100.0, "ratio": 1.0,
             "read_gbytes": 25.0, "peak_gflops": 400.0}  # fmt: skip
    return generation.Result(**usual | changes)


def test_a_race_takes_the_place_of_the_one_before(tmp_path):
    path = tmp_path / "races.csv"
    old = [result(), result(provider="a peer", median=80.0, ratio=1.25), result(bits=4)]
    generation.save(path, old)
    assert generation.load(path) == old
    generation.save(path, [result(median=120.0)])
    assert generation.load(path) == [old[2], result(median=120.0)]
    assert [p.name for p in tmp_path.iterdir()] == ["races.csv"]


def test_the_table_has_the_best_peer_first_and_shares_of_the_ceilings():
    raced = [result(), result(provider="b", median=50.0, ratio=2.0), result(provider="c", median=125.0, ratio=0.8)]
    prompt = result(measure="prefill", median=20000.0)
    alone = dataclasses.replace(result(), shape="gpt2", read_gbytes=31.0)
    lines = generation.markdown([alone, *raced, prompt]).splitlines()
    assert lines[0] == "a processor, avx2, 2 threads, 400 GFLOP/s in fp32, 25 to 31 GB/s of reads."
    assert lines[4:] == ["| 15m | 8 | decode | 100 | 6% | c 125 (0.80x), b 50 (2.00x) |",
                         "| 15m | 8 | prefill | 2e+04 | 60% | none |",
                         "| gpt2 | 8 | decode | 100 | 43% | none |"]  # fmt: skip
    before_peaks = generation.markdown([dataclasses.replace(prompt, peak_gflops=math.nan)]).splitlines()
    assert before_peaks[0] == "a processor, avx2, 2 threads, 25 GB/s of reads."
    assert before_peaks[4] == "| 15m | 8 | prefill | 2e+04 |  | none |"


def test_what_is_unknown_is_named():
    with pytest.raises(ValueError, match="no race has ', 3 bits'"):
        generation.run(only=", 3 bits")
