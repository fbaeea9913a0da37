"""What `peft` wrote, of every method it has, merged and exported: ONNX Runtime computes what `peft`'s own model does.

LoRA on every kind of layer is in `test_peft_lora.py`, plain prompts and prefixes are in `test_soft_prompts.py` too. A
default run has the other methods, on architectures that HF PEFT's tables do not list;
`pytest -m slow tests/files/test_peft_adapters.py` has each on every model that `peft` can adapt.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.parity import UNSEEN, changed, farthest, outputs
from support.peft_adapters import ADAPTION, WEIGHTS, adapted
from support.soft_cases import BOTH, CAUSAL, ENCODERS, FEATURES, task
from support.zoo import ZOO
from torch import Tensor, nn

from peftfx.export import OnnxModel
from peftfx.export.command import export_directory
from peftfx.methods import methods

QUICK = {
    *(("ia3", "dinov2"), ("dora", "qwen2"), ("adalora", "distilbert")),
    *(("lstm", "falcon"), ("adaption", "mistral")),
}


def cases() -> Iterator[tuple[str, str]]:
    """A method and a model of the zoo, for each pair that `peft` has."""
    known = {m for m, kind in {"adalora": "ADALORA", "adaption": "ADAPTION_PROMPT"}.items() if kind not in methods()}
    yield from ((m, n) for m in WEIGHTS if m not in known for n in ZOO if n != "custom")
    yield from ((m, n) for m in ("prompt", "mlp", "lstm") for n in (*CAUSAL, *ENCODERS, *BOTH))
    yield from ((m, n) for m in ("prefix", "projected") for n in (*CAUSAL, FEATURES, *BOTH))
    yield from (("adaption", n) for n in ADAPTION if "adaption" not in known)


@pytest.mark.parametrize(
    ("method", "name"),
    [pytest.param(m, n, id=f"{m}-{n}", marks=() if (m, n) in QUICK else pytest.mark.slow) for m, n in cases()],
)
def test_it_is_served_as_peft_computes_it(method: str, name: str, tmp_path: Path) -> None:
    base, theirs = adapted(method, name)
    base.save_pretrained(tmp_path / "base")  # type: ignore[operator]
    theirs.save_pretrained(str(tmp_path / "adapter"))
    report = export_directory(
        tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", task=task(name), view="forward"
    )
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
