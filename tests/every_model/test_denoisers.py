"""Denoisers of diffusion pipelines: example inputs that their code takes, and one of them exported from its folder."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from every_model.checks import build
from every_model.diffusion_models import MODELS
from support.adapted import randomise
from support.parity import outputs

from peftfx.bases.example_inputs import example_inputs
from peftfx.export import OnnxModel
from peftfx.export.command import export_directory


@pytest.mark.parametrize("name", MODELS)
def test_a_denoiser_takes_its_example_inputs(name: str) -> None:
    model = build("diffusers", name)
    for sizes in ({}, {"batch": 1, "sequence": 4}):
        inputs = example_inputs(model, sizes=sizes)
        with torch.no_grad():
            assert model(**inputs).values()
        assert {len(inputs[n]) for n in ("sample", "hidden_states", "timestep") if n in inputs} == {
            sizes.get("batch", 2)
        }
    again = example_inputs(model, sizes=sizes)
    flat = torch.utils._pytree.tree_leaves([inputs, again])
    assert all(a.equal(b) for a, b in zip(flat[: len(flat) // 2], flat[len(flat) // 2 :], strict=True))


def test_a_transformer_is_exported_from_its_folder_with_a_lora(tmp_path: Path) -> None:
    base = build("diffusers", "sd3")
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=["to_q", "to_v", "proj_out"]))
    randomise(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    report = export_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")
    assert report.inputs["pooled_projections"] == ["batch", 16]
    served = OnnxModel(tmp_path / "out")
    inputs = example_inputs(base.eval(), sizes={"batch": 3, "sequence": 5}, seed=4)
    with torch.no_grad():
        (want,) = outputs(model.eval(), inputs).values()
    torch.testing.assert_close(served(**inputs)["sample"], want, atol=1e-4, rtol=1e-4)
