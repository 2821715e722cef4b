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
from pyllm.training import plot_losses, warmup_cosine

PROMPT = "The "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    parser.add_argument("--steps", type=int, default=600, help="training steps of each model")
    parser.add_argument("--skip-bench", action="store_true")
    arguments = parser.parse_args()
    console, began = Console(highlight=False), time.perf_counter()

    training_text, validation_text = split(embedded_corpus(), 0.1)
    tokenizer = pyllm.Tokenizer.train("bpe:1024", [training_text])
    training, validation = (tokenizer.encode(t) for t in (training_text, validation_text))
    console.print(f"{len(training):,} tokens of {len(training_text):,} characters to train on, vocabulary "
                  f"{tokenizer.vocab_size:,}, {pyllm.num_threads()} threads, {pyllm.info()['chosen']}")  # fmt: skip

    torch.manual_seed(0)
    models = {
        "LSTM": pyllm.LanguageModel(tokenizer.vocab_size, hidden_size=256, num_layers=2, dropout=0.1, cell="lstm"),
        "GPT": pyllm.Decoder(tokenizer.vocab_size, hidden_size=256, num_layers=4, num_heads=4, context_length=128),
    }
    table = Table("model", "parameters", "train loss", "validation loss", "perplexity", "accuracy", "tokens/s")
    histories, samples = {}, {}
    for name, model in models.items():
        console.print(f"\n[bold]{name}[/bold]")
        batches = SequenceLoader(training, batch_size=16, sequence_length=128, shuffle=name == "GPT", seed=0)
        held_out = SequenceLoader(validation, batch_size=16, sequence_length=128)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
        folder = arguments.out / name.lower()
        history = pyllm.train(model, batches, optimizer, steps=arguments.steps, schedule=warmup_cosine(arguments.steps),
                              validation=held_out, validate_every=max(1, arguments.steps // 6), folder=folder,
                              tokenizer=tokenizer)  # fmt: skip
        scores = history.validation[-1][1]
        recent = history.losses[-30:]
        table.add_row(name, f"{model.num_parameters():,}", f"{sum(recent) / len(recent):.3f}", f"{scores.loss:.3f}",
                      f"{scores.perplexity:.1f}", f"{scores.accuracy:.1%}",
                      f"{history.tokens_per_second:,.0f}")  # fmt: skip
        reloaded, its_tokenizer = pyllm.load(folder)
        samples[name] = pyllm.generate(
            reloaded, its_tokenizer, PROMPT, max_tokens=100, temperature=0.8, top_p=0.95, seed=1
        )
        histories[name] = history
        console.print(f"saved to {folder}; it writes:\n{PROMPT}{samples[name]}", markup=False, style="dim")

    plot_losses(histories, arguments.out / "loss.png")
    console.print()
    console.print(table)
    console.print(f"loss curves: {arguments.out / 'loss.png'}   trained in {time.perf_counter() - began:.0f} s\n")
    if not arguments.skip_bench:
        benchmarks.run([], quick=True)


if __name__ == "__main__":
    main()
