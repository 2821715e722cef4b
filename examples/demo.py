"""Trains the recurrent language model and a small GPT on text that every Python carries, and lets both write."""

import argparse
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import pyllm
from pyllm import benchmarks
from pyllm.data import SequenceLoader, embedded_corpus, split
from pyllm.training import AdamW, plot_losses, warmup_cosine

PROMPT = "The "
console = Console(highlight=False, width=None if Console().is_terminal else 120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--steps", type=float, default=1.0, help="share of the usual training, to try things out")
    arguments = parser.parse_args()
    began = time.perf_counter()

    training_text, validation_text = split(embedded_corpus(), 0.1)
    tokenizer = pyllm.Tokenizer.train("bpe:1024", [training_text])
    training, validation = (tokenizer.encode(t) for t in (training_text, validation_text))
    console.print(f"{len(training):,} tokens ({len(training_text):,} characters) to train on, vocabulary "
                  f"{tokenizer.vocab_size:,}, {pyllm.num_threads()} threads, {pyllm.info()['chosen']}")  # fmt: skip

    torch.manual_seed(0)
    lstm = pyllm.LanguageModel(tokenizer.vocab_size, hidden_size=256, num_layers=1, dropout=0.1, cell="lstm")
    gpt = pyllm.Decoder(tokenizer.vocab_size, hidden_size=128, num_layers=4, num_heads=4, context_length=128)
    results = Table("model", "parameters", "training loss", "validation loss", "perplexity", "accuracy", "tokens/s")
    histories = {}
    for name, model, length, batch, rate, usual in (
        ("LSTM", lstm, 32, 16, 1e-2, 1500),
        ("GPT", gpt, 128, 8, 6e-3, 700),
    ):
        steps, folder = max(1, int(usual * arguments.steps)), arguments.out / name.lower()
        console.print(f"\n[bold]{name}[/bold]: {steps:,} steps of {batch} x {length} tokens")
        batches = SequenceLoader(training, batch, length, shuffle=name == "GPT")
        held_out = SequenceLoader(validation, batch, length)
        optimizer = AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.01)
        history = pyllm.train(model, batches, optimizer, steps=steps, schedule=warmup_cosine(steps),
                              validation=held_out, validate_every=max(1, steps // 6), folder=folder,
                              tokenizer=tokenizer)  # fmt: skip
        histories[name], recent, scores = history, history.losses[-30:], history.validation[-1][1]
        results.add_row(name, f"{model.num_parameters():,}", f"{sum(recent) / len(recent):.3f}", f"{scores.loss:.3f}",
                        f"{scores.perplexity:.1f}", f"{scores.accuracy:.1%}",
                        f"{history.tokens_per_second:,.0f}")  # fmt: skip
        model, its_tokenizer = pyllm.load(folder)
        text = pyllm.generate(model, its_tokenizer, PROMPT, max_tokens=100, temperature=0.7, top_p=0.95, seed=2)
        console.print(f"saved to {folder}; it writes:")
        console.print(PROMPT + text, markup=False, style="italic")

    plot_losses(histories, arguments.out / "loss.png")
    console.print(results)
    console.print(f"loss curves: {arguments.out / 'loss.png'}; this took {time.perf_counter() - began:.0f} s\n")
    compare_operations()


def compare_operations() -> None:
    """Compiled operations beside torch's and the plain references, forward and backward, on this machine. Where torch
    has no such operation, the reference stands in its place."""
    table = Table("operation", "size", "pyllm", "torch", "reference", "faster than torch")
    for case in benchmarks.cases(sizes="small", only="fp32"):
        if case.mode == "forward" and case.op not in ("adamw", "sample"):
            continue
        rows = {row.provider: row for row in benchmarks.measure(case, seconds=0.2)}
        times = (f"{rows[p].p50_us / 1e3:,.3f} ms" if p in rows else "" for p in ("pyllm", "torch", "reference"))
        table.add_row(case.op, case.name, *times, f"{rows['pyllm'].ratio:.2f}x")
    console.print(table)


if __name__ == "__main__":
    main()
