"""One model is adapted and exported again and again in one process: what one translation leaves harms no other."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from support.adapted import randomise
from support.few import but_further
from support.zoo import ZOO

import peftfx
from peftfx.bases.example_inputs import example_inputs
from peftfx.export import OnnxModel


@pytest.mark.parametrize("name", but_further({"deberta"}, ("deberta", "deberta_v2")))
def test_another_adapter_is_exported_after_the_first(name: str, tmp_path: Path) -> None:
    """Both models' code reads numbers from tensors, of which a translation makes new symbols in the graph's own set."""
    base = ZOO[name].build()
    ours = peftfx.transform(base, peftfx.LoRA(r=2, target="attention"))
    call = example_inputs(base, sizes={"batch": 3, "sequence": 9}, seed=4)
    found = []
    for i, rule in enumerate((None, peftfx.LoRA(r=3, target="attention"), peftfx.LoRA(r=2, target="mlp"))):
        if rule is not None:
            ours.add_adapter(f"other{i}", rule)
        randomise(ours)
        ours.export(tmp_path / str(i), view="forward")
        served = OnnxModel(tmp_path / str(i))
        (want, *_) = ours(**call).values()
        found.append(served(**{n: v for n, v in call.items() if n in served.inputs})[next(iter(served.outputs))])
        torch.testing.assert_close(found[-1], want.detach(), atol=1e-4, rtol=1e-3)
    assert not any(torch.allclose(one, other, atol=1e-3) for one, other in pairwise(found))
