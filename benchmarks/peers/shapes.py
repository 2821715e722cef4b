"""The shapes that are raced, as randomly initialised Hugging Face checkpoints.

Usage: main/bin/python shapes.py [SHAPE ...]
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(os.environ.get("PEERS", pathlib.Path.home() / ".cache/pyllm-peers"))
SHAPES = {
    "15m": (
        "Llama",
        dict(
            num_hidden_layers=6,
            hidden_size=288,
            intermediate_size=768,
            num_attention_heads=6,
            num_key_value_heads=6,
            vocab_size=32000,
            max_position_embeddings=1024,
            rms_norm_eps=1e-5,
        ),
    ),
    "gpt2": ("GPT2", dict()),
    "qwen05": (
        "Qwen2",
        dict(
            num_hidden_layers=24,
            hidden_size=896,
            intermediate_size=4864,
            num_attention_heads=14,
            num_key_value_heads=2,
            vocab_size=151936,
            max_position_embeddings=32768,
            rms_norm_eps=1e-6,
            rope_theta=1e6,
            use_sliding_window=False,
        ),
    ),
    "llama1b": (
        "Llama",
        dict(
            num_hidden_layers=16,
            hidden_size=2048,
            intermediate_size=8192,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=64,
            vocab_size=128256,
            max_position_embeddings=8192,
            rms_norm_eps=1e-5,
            rope_theta=500000.0,
        ),
    ),
}


def make(name):
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = ROOT / "models" / name
    if (folder / "tokenizer.json").exists():
        return folder
    family, settings = SHAPES[name]
    config = getattr(transformers, family + "Config")(
        bos_token_id=1, eos_token_id=2, tie_word_embeddings=True, **settings
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder, max_shard_size="20GB")
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(config.vocab_size)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="t0", bos_token="t1", eos_token="t2", pad_token="t0"
    ).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    for shape in sys.argv[1:] or SHAPES:
        print(make(shape), flush=True)
