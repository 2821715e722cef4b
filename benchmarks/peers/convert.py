"""Converts a shape for the peers that need it.

Usage: main/bin/python convert.py SHAPE... [--to gguf,ct2,openvino,onnx]
"""

import argparse
import json
import os
import subprocess

import shapes

GGUF_TYPES = {"f32": 0, "bf16": 32, "q8_0": 7, "q4_0": 2, "q4_k_m": 15}  # llama.cpp's llama_ftype


def pairs(x, heads):
    """Rows of halves (i, i + n) as neighbours (2 i, 2 i + 1), head by head: how llama.cpp turns queries and keys."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def gguf(name):
    import gguf as G
    from safetensors import safe_open

    folder = shapes.ROOT / "models" / name
    c = json.loads((folder / "config.json").read_text())
    arch = {"llama": G.MODEL_ARCH.LLAMA, "gpt2": G.MODEL_ARCH.GPT2, "qwen2": G.MODEL_ARCH.QWEN2}[c["model_type"]]
    full = folder / "f32.gguf"
    if not full.exists():
        w = G.GGUFWriter(str(full) + ".part", c["model_type"])
        gpt = c["model_type"] == "gpt2"
        layers, heads, width = (
            (c["n_layer"], c["n_head"], c["n_embd"])
            if gpt
            else (c["num_hidden_layers"], c["num_attention_heads"], c["hidden_size"])
        )
        kv = heads if gpt else c["num_key_value_heads"]
        w.add_block_count(layers)
        w.add_head_count(heads)
        w.add_head_count_kv(kv)
        w.add_embedding_length(width)
        w.add_context_length(c["n_positions"] if gpt else c["max_position_embeddings"])
        w.add_feed_forward_length(4 * width if gpt else c["intermediate_size"])
        if gpt:
            w.add_layer_norm_eps(c["layer_norm_epsilon"])
        else:
            w.add_layer_norm_rms_eps(c["rms_norm_eps"])
            w.add_rope_dimension_count(c.get("head_dim") or width // heads)
            w.add_rope_freq_base(float((c.get("rope_parameters") or c)["rope_theta"]))
        w.add_vocab_size(c["vocab_size"])
        w.add_tokenizer_model("no_vocab")
        w.add_file_type(0)
        names = G.get_tensor_name_map(arch, layers)
        with safe_open(folder / "model.safetensors", "pt") as f:
            for key in f.keys():  # noqa: SIM118
                t = f.get_tensor(key).float()
                if gpt and key.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
                    t = t.t()
                if c["model_type"] == "llama" and "q_proj" in key:
                    t = pairs(t, heads)
                if c["model_type"] == "llama" and "k_proj" in key:
                    t = pairs(t, kv)
                w.add_tensor(names.get_name(key, try_suffixes=(".weight", ".bias")), t.contiguous().numpy())
        w.write_header_to_file()
        w.write_kv_data_to_file()
        w.write_tensors_to_file()
        w.close()
        os.replace(str(full) + ".part", full)
    import llama_cpp

    for kind, code in GGUF_TYPES.items():
        out = folder / f"{kind}.gguf"
        if not out.exists():
            p = llama_cpp.llama_model_quantize_default_params()
            p.ftype = code
            p.nthread = 2
            if llama_cpp.llama_model_quantize(str(full).encode(), str(out).encode(), p):
                raise SystemExit(f"could not quantise to {kind}")
        print(out, out.stat().st_size, flush=True)


def run(out, *command):
    """A command that makes the folder `{out}`: beside its place first, so that what fails leaves nothing there."""
    part = out.with_name(out.name + ".part")
    command = [part if x == "{out}" else x for x in command]
    env = dict(os.environ, TRANSFORMERS_OFFLINE="1", HF_HUB_OFFLINE="1")
    subprocess.run([str(x) for x in command], check=True, env=env)
    part.rename(out)


def ct2(name):
    for kind in ("float32", "int8"):
        out = shapes.ROOT / "models" / name / f"ct2-{kind}"
        if not out.exists():
            run(out, shapes.ROOT / "main/bin/ct2-transformers-converter", "--model", shapes.ROOT / "models" / name,
                "--output_dir", "{out}", "--quantization", kind, "--force")  # fmt: skip


def openvino(name):
    c = json.loads((shapes.ROOT / "models" / name / "config.json").read_text())
    width = c.get("hidden_size") or c["n_embd"]
    group = [] if width % 128 == 0 else ["--group-size", "32"]  # its own is 128, and must divide the width
    for kind in ("int8", "int4"):
        out = shapes.ROOT / "models" / name / f"openvino-{kind}"
        if not out.exists():
            run(out, shapes.ROOT / "openvino/bin/optimum-cli", "export", "openvino", "--model",
                shapes.ROOT / "models" / name, "--task", "text-generation-with-past", "--weight-format", kind,
                *(group if kind == "int4" else []), "{out}")  # fmt: skip


def onnx(name):
    c = json.loads((shapes.ROOT / "models" / name / "config.json").read_text())
    if c["model_type"] == "gpt2":
        return print("onnxruntime-genai does not build GPT-2", flush=True)
    out = shapes.ROOT / "models" / name / "onnx-int4"
    if not out.exists():
        run(out, shapes.ROOT / "onnx/bin/python", "-m", "onnxruntime_genai.models.builder", "-i",
            shapes.ROOT / "models" / name, "-o", "{out}", "-p", "int4", "-e", "cpu")  # fmt: skip


if __name__ == "__main__":
    a = argparse.ArgumentParser()
    a.add_argument("shape", nargs="+")
    a.add_argument("--to", default="gguf,ct2,openvino,onnx")
    a = a.parse_args()
    for shape in a.shape:
        for target in a.to.split(","):
            {"gguf": gguf, "ct2": ct2, "openvino": openvino, "onnx": onnx}[target](shape)
