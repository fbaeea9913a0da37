"""What `peft` wrote, of every method it has, merged and exported: ONNX Runtime computes what `peft`'s own model does.

LoRA on every kind of layer is in `test_export.py`, plain prompts and prefixes are in `test_soft.py` too. A default run
has the other methods, on architectures that HF PEFT's tables do not list; `pytest -m slow tests/test_peft_adapters.py`
has each on every model that `peft` can adapt.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import peft
import pytest
from compare import changed, farthest
from soft_cases import FEATURES, LSTM, MLP, PREFIX, PROJECTED, PROMPT_TUNING, Soft, bare, build, task
from test_export import UNSEEN, adaptable, outputs, randomise
from test_soft import BOTH, CAUSAL, ENCODERS
from torch import Tensor, nn
from zoo import ZOO

import peftfx
from peftfx.export import OnnxModel
from peftfx.export.command import export_directory
from peftfx.methods import methods


def linear(model: nn.Module, *roles: str) -> list[str]:
    """The paths of linear modules that `peft` can adapt; with roles, those that have one of them."""
    sites = [s for s in peftfx.inspect(model) if s.kind == "linear" and s.role != "head"]
    sites = [s for s in sites if adaptable(model.get_submodule(s.path))]
    fused = {s.path: {s.role, *(p.role for p in s.parts)} for s in sites}
    return [path for path, own in fused.items() if not roles or own & set(roles)]


def ia3(model: nn.Module) -> peft.PeftConfig:
    down = linear(model, "mlp.down")
    target = [*linear(model, "attention.key", "attention.value", "attention.query"), *down]
    return peft.IA3Config(target_modules=target, feedforward_modules=down)


def dora(model: nn.Module) -> peft.PeftConfig:
    return peft.LoraConfig(target_modules=linear(model), r=4, lora_alpha=6, use_dora=True)


def adalora(model: nn.Module) -> peft.PeftConfig:
    return peft.AdaLoraConfig(target_modules=linear(model), init_r=4, target_r=2, total_step=20, tinit=2, tfinal=2)


def vera(model: nn.Module) -> peft.PeftConfig:
    return peft.VeraConfig(target_modules=linear(model), r=6, projection_prng_key=2)


def ln_tuning(model: nn.Module) -> peft.PeftConfig:
    return peft.LNTuningConfig(target_modules=[s.path for s in peftfx.inspect(model) if s.kind == "norm"])


WEIGHTS: Mapping[str, Callable[[nn.Module], peft.PeftConfig]] = {
    "ia3": ia3,
    "dora": dora,
    "adalora": adalora,
    "vera": vera,
    "ln_tuning": ln_tuning,
}
SOFT: Mapping[str, Soft] = {"prompt": PROMPT_TUNING, "mlp": MLP, "lstm": LSTM, "prefix": PREFIX, "projected": PROJECTED}
ADAPTION = ("llama", "mistral", "gpt2")  # what peft knows
QUICK = {
    *(("ia3", "dinov2"), ("dora", "qwen2"), ("adalora", "distilbert"), ("vera", "electra"), ("ln_tuning", "qwen3")),
    *(("lstm", "falcon"), ("projected", "gemma"), ("adaption", "mistral")),
}


def cases() -> Iterator[tuple[str, str]]:
    """A method and a model of the zoo, for each pair that `peft` has."""
    known = {m for m, kind in {"adalora": "ADALORA", "adaption": "ADAPTION_PROMPT"}.items() if kind not in methods()}
    yield from ((m, n) for m in WEIGHTS if m not in known for n in ZOO if n != "custom")
    yield from ((m, n) for m in ("prompt", "mlp", "lstm") for n in (*CAUSAL, *ENCODERS, *BOTH))
    yield from ((m, n) for m in ("prefix", "projected") for n in (*CAUSAL, FEATURES, *BOTH))
    yield from (("adaption", n) for n in ADAPTION if "adaption" not in known)


def adapted(method: str, name: str) -> tuple[nn.Module, nn.Module]:
    """A base, and `peft`'s model on a copy of it, every adapter off its start."""
    if method in SOFT:
        theirs = SOFT[method].theirs(name)
        return bare(theirs), theirs
    base = build(name)
    if method == "adaption":
        config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2, task_type="CAUSAL_LM")
    else:
        config = WEIGHTS[method](base)
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    randomise(theirs)
    return base, theirs.eval()


@pytest.mark.parametrize(
    ("method", "name"),
    [pytest.param(m, n, id=f"{m}-{n}", marks=() if (m, n) in QUICK else pytest.mark.slow) for m, n in cases()],
)
def test_it_is_served_as_peft_computes_it(method: str, name: str, tmp_path: Path) -> None:
    base, theirs = adapted(method, name)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    theirs.save_pretrained(str(tmp_path / "adapter"))
    report = export_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", task=task(name))
    assert report.merged or report.folded
    served = OnnxModel(tmp_path / "out")
    for seed, (batch, sequence) in enumerate(UNSEEN):
        call = inputs(name, base, batch, sequence, seed + 3)
        found = {key.removesuffix(".output"): value for key, value in served(**call).items()}
        want, plain = outputs(theirs, call), outputs(base, call)
        assert farthest(found, want, call) <= 1e-4
        assert changed(want, plain)


def inputs(name: str, base: nn.Module, batch: int, sequence: int, seed: int) -> dict[str, Tensor]:
    """Keyword arguments of a call."""
    return ZOO["bert" if name == FEATURES else name].inputs(batch, sequence, seed, model=base)
