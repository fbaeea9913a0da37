"""LoRAs in files of diffusers have the scale of the config in the file's metadata, as diffusers itself reads it."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.adapted import randomise
from support.few import but_for
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.adapters.files.names import name_of_base
from peftfx.adapters.single_files.reading import as_peft
from peftfx.errors import PeftfxError
from peftfx.export.convert_command import convert_directory
from peftfx.testing.models import Causal

pytestmark = pytest.mark.further

FILE = "pytorch_lora_weights.safetensors"
CONFIGS = {
    "alpha": {"lora_alpha": 8},
    "rslora": {"lora_alpha": 4, "use_rslora": True},
    "patterns": {"rank_pattern": {"to_v": 2}, "alpha_pattern": {"to_q": 9}},
}


def _said(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**inputs).sample
    return found


@pytest.mark.parametrize("name", but_for({"alpha", "rslora"}, CONFIGS))
def test_a_file_has_the_scale_of_its_metadata(name: str, tmp_path: Path) -> None:
    base = ZOO["unet"].build().eval()
    base.save_pretrained(tmp_path / "base")
    inputs = ZOO["unet"].inputs(2, 5, 1, model=base)
    before = _said(base, inputs)
    base.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1"], **CONFIGS[name]))
    randomise(base)
    want = _said(base, inputs)
    base.save_lora_adapter(tmp_path / "theirs")
    with pytest.raises(PeftfxError, match="has layers of peft in it, and is no PeftModel"):
        peftfx.transform(base, inputs=inputs)
    plain = type(base).from_pretrained(tmp_path / "base").eval()
    plain.load_lora_adapter(tmp_path / "theirs", prefix=None, weight_name=FILE)
    torch.testing.assert_close(_said(plain, inputs), want)
    convert_directory(tmp_path / "base", tmp_path / "ours", file=tmp_path / "theirs" / FILE)
    fresh = type(base).from_pretrained(Path(tmp_path / "base")).eval()  # diffusers keeps the Path as its name
    ours = peftfx.load(fresh, tmp_path / "ours", inputs=inputs)
    torch.testing.assert_close(_said(ours, inputs), want, rtol=1e-4, atol=1e-5)
    assert (want - before).abs().max() > 1e-2
    assert name_of_base(fresh) == str(tmp_path / "base")
    ours.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").exists()


def test_each_model_of_a_file_has_its_own_config_and_older_names_are_read(tmp_path: Path) -> None:
    base = Causal((), layers=1).build()
    path, rng = "model.layers.0.self_attn.q_proj", torch.Generator().manual_seed(0)
    out, columns = base.get_submodule(path).weight.shape
    a, b = torch.randn(3, columns, generator=rng), torch.randn(out, 3, generator=rng)
    stem = f"text_encoder.{path}.lora_linear_layer"
    told = {"text_encoder.r": 3, "text_encoder.lora_alpha": 12, "unet.r": 3, "unet.lora_alpha": 1}
    file = tmp_path / FILE
    tensors = {f"{stem}.down.weight": a, f"{stem}.up.weight": b}
    save_file(tensors, file, metadata={"format": "pt", "lora_adapter_metadata": json.dumps(told)})
    config, found = as_peft(file, base)
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 12, [path])
    assert torch.equal(found[f"base_model.model.{path}.lora_B.weight"], b)
    save_file(load_file(file), file)
    assert as_peft(file, base)[0]["lora_alpha"] == 3, "without a config the scale is 1, as in diffusers"
    save_file(tensors, file, metadata={"lora_adapter_metadata": "[1"})
    with pytest.raises(PeftfxError, match="its metadata lora_adapter_metadata are no config of a LoRA"):
        as_peft(file, base)
