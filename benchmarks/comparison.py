"""What other exporters make of HF PEFT's adapters: how far each one's ONNX model is from `peft`'s own logits.

    python benchmarks/comparison.py FOLDER [--olive ENV/bin] [--optimum ENV/bin]

A tiny random LLaMA and seven random adapters are made in FOLDER. peftfx exports them here; Olive and optimum-onnx want
older packages, so each runs from an environment of its own, by its command line:

    pip install olive-ai peft onnxruntime 'onnxruntime-genai<0.12' 'transformers<4.58' requests
    pip install 'optimum-onnx[onnxruntime]' peft

A figure is the largest difference from `peft` over the largest logit, in ONNX Runtime here. "the base" means that the
model computes what the base does: the adapter was left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
import peft
import tokenizers
import torch
import transformers as hf

_TASK: Mapping[str, str] = {"task_type": "CAUSAL_LM"}
CONFIGS: Mapping[str, Callable[[], peft.PeftConfig]] = {
    "LoRA": lambda: peft.LoraConfig(target_modules="all-linear", **_TASK),
    "DoRA": lambda: peft.LoraConfig(target_modules="all-linear", use_dora=True, **_TASK),
    "IA3": lambda: peft.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"], **_TASK),
    "embedding": lambda: peft.LoraConfig(target_modules=["embed_tokens", "q_proj"], **_TASK),
    "modules_to_save": lambda: peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], **_TASK),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, **_TASK),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=5, **_TASK),
}
_SAME = 1e-4
_SECONDS = 300  #: for one export


def made(folder: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A base and its adapters in a folder; tokens, and the logits of each adapter and of the base."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    hf.LlamaForCausalLM(config).save_pretrained(folder / "base")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{i}": i for i in range(256)}, unk_token="w0"))
    words.save(str(folder / "base" / "tokenizer.json"))
    said = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0", "eos_token": "w2", "pad_token": "w3"}
    (folder / "base" / "tokenizer_config.json").write_text(json.dumps(said))
    ids = torch.randint(4, 256, (2, 9))
    logits = {"base": hf.LlamaForCausalLM.from_pretrained(folder / "base").eval()(ids).logits.detach()}
    for name, made_config in CONFIGS.items():
        base = hf.LlamaForCausalLM.from_pretrained(folder / "base")
        adapted = peft.get_peft_model(base, made_config()).eval()
        with torch.no_grad():
            for p in adapted.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.2 * max(float(p.abs().mean()), 0.1))
            out = adapted(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        logits[name] = out[:, -ids.shape[1] :]
        adapted.save_pretrained(folder / name)
        shutil.copy(folder / "base" / "config.json", folder / name)  # optimum reads the model's kind from it
        for file in (folder / "base").glob("tokenizer*"):
            shutil.copy(file, folder / name)
    return ids, logits


def distance(folder: Path, ids: torch.Tensor, want: torch.Tensor, base: torch.Tensor) -> str:
    """How far the logits of an exported model are from an adapter's."""
    found = sorted(folder.rglob("*.onnx"))
    if not found:
        return "fails"
    try:
        session = ort.InferenceSession(found[0])
    except Exception as error:  # ONNX Runtime's own classes, one for each status
        return f"not a valid model ({type(error).__name__})"
    feed = {"input_ids": ids.numpy(), "attention_mask": np.ones(ids.shape, np.int64)}
    feed["position_ids"] = np.arange(ids.shape[1])[None].repeat(len(ids), 0)
    for given in session.get_inputs():
        if "past" in given.name:
            shape = [len(ids), *(n if isinstance(n, int) else 0 for n in given.shape[1:])]
            feed[given.name] = np.zeros(shape, np.float32)
    known = {given.name for given in session.get_inputs()}
    got = session.run(None, {name: value for name, value in feed.items() if name in known})[0][:, -ids.shape[1] :]
    off, plain = (float(np.abs(got - x.numpy()).max() / want.abs().max()) for x in (want, base))
    return f"{off:.0e}" if off < _SAME else f"{off:.2f}, the base" if plain < _SAME else f"{off:.2f}"


def commands(folder: Path, name: str, args: argparse.Namespace) -> dict[str, list[str | Path]]:
    """What exports an adapter, by exporter."""
    base, adapter, out = folder / "base", folder / name, folder / "out"
    ours = ["export", "--base", base, "--adapter", adapter, "--merge", "--force", "--output", out / f"peftfx-{name}"]
    found: dict[str, list[str | Path]] = {"peftfx": [sys.executable, "-m", "peftfx", *ours]}
    if args.optimum:
        tasks = ["--library", "transformers", "--task", "text-generation-with-past"]
        found["optimum-onnx"] = [args.optimum / "optimum-cli", "export", "onnx", "-m", adapter, *tasks]
        found["optimum-onnx"] += [out / f"optimum-onnx-{name}"]
    if args.olive:
        start = [args.olive / "olive", "capture-onnx-graph", "-m", base, "-a", adapter, "--disable_telemetry"]
        for kind, flags in (("exporter", ["--use_dynamo_exporter"]), ("builder", ["--use_model_builder"])):
            found[f"Olive, {kind}"] = [*start, *flags, "--precision", "fp32", "-o", out / f"Olive, {kind}-{name}"]
    return found


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--olive", type=Path)
    parser.add_argument("--optimum", type=Path)
    args = parser.parse_args()
    args.folder = args.folder.resolve()
    ids, logits = made(args.folder)
    rows: dict[str, list[str]] = {}
    for name in CONFIGS:
        for exporter, command in commands(args.folder, name, args).items():
            environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
            if exporter != "peftfx":  # from an environment of its own
                environment = {k: v for k, v in environment.items() if k != "PYTHONPATH"}
                environment["PATH"] = f"{Path(command[0]).parent}:{environment['PATH']}"
            words = list(map(str, command))  # where they run, some leave a cache
            subprocess.run(words, cwd=args.folder, env=environment, capture_output=True, timeout=_SECONDS, check=False)
            out = args.folder / "out" / f"{exporter}-{name}"
            rows.setdefault(exporter, []).append(distance(out, ids, logits[name], logits["base"]))
    print(f"| | {' | '.join(CONFIGS)} |\n| {' | '.join(['---'] * (len(CONFIGS) + 1))} |")
    for exporter, cells in rows.items():
        print(f"| {exporter} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
