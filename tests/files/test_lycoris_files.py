"""LyCORIS's LoKr, and LoRAs with a core, in one file. The oracle is the weight itself, made by LyCORIS's formula."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import peftfx
from peftfx.adapters.files.writer import write_rule_directory
from peftfx.adapters.single_files.reading import as_peft
from peftfx.errors import PeftfxError
from peftfx.rules.peft_files import WEIGHTS

pytestmark = pytest.mark.further
Sizes = tuple[int, ...]


class Layers(nn.Module):
    """Two linear layers of unequal sizes, and convs with and without a kernel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.narrow = nn.Conv2d(8, 12, 1, bias=False)
        self.low = nn.Linear(12, 18)
        self.high = nn.Linear(18, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.high(torch.tanh(self.low(torch.tanh(self.narrow(torch.tanh(self.wide(x)))).mean((2, 3)))))


#: The two factors' sizes of each layer by LyCORIS's `factor=4`: of outputs, of inputs, and the kernel.
SIZES: Mapping[str, tuple[Sizes, Sizes, Sizes]] = {
    "wide": ((4, 2), (2, 3), (3, 3)),
    "narrow": ((4, 3), (4, 2), (1, 1)),
    "low": ((3, 6), (4, 3), ()),
    "high": ((4, 2), (3, 6), ()),
}


def lokr(place: str, form: str, r: int) -> dict[str, Tensor]:
    """Random tensors of a layer, as LyCORIS names them."""
    (a, c), (b, d), kernel = SIZES[place]
    flat = int(torch.tensor(kernel).prod()) if kernel else 1
    one = {"w1": (a, b)} if "1ab" not in form else {"w1_a": (a, r), "w1_b": (r, b)}
    if "t2" in form and flat > 1:
        other: dict[str, Sizes] = {"t2": (r, r, *kernel), "w2_a": (r, c), "w2_b": (r, d)}
    elif "2full" in form:
        other = {"w2": (c, d, *kernel)}
    else:
        other = {"w2_a": (c, r), "w2_b": (r, d * flat)}
    return {f"lokr_{name}": torch.randn(size) * 0.6 for name, size in {**one, **other}.items()}


def dense(place: str, parts: Mapping[str, Tensor], shape: Sizes) -> Tensor:
    """What LyCORIS adds to a weight, before its scale: `make_kron` of the rebuilt factors."""
    p = {name.removeprefix("lokr_"): t for name, t in parts.items()}
    one = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
    if "t2" in p:
        other = torch.einsum("ijmn,ip,jr->prmn", p["t2"], p["w2_a"], p["w2_b"])
    else:
        other = p["w2"] if "w2" in p else p["w2_a"] @ p["w2_b"]
        (_, c), (_, d), kernel = SIZES[place]
        other = other.reshape(c, d, *kernel)
    for _ in range(other.ndim - 2):
        one = one[..., None]
    return torch.kron(one, other).reshape(shape)


def compare(updates: Mapping[str, Tensor], file: Path, directory: Path) -> dict[str, object]:
    """Hold the model with the file's adapter to the model whose weights have these updates."""
    x, want = torch.randn(3, 6, 7, 5), Layers().eval()
    before = want(x)
    with torch.no_grad():
        for place, update in updates.items():
            want.get_submodule(place).weight += update  # type: ignore[operator]
    config, tensors = as_peft(file, Layers())
    directory.mkdir()
    write_rule_directory(directory, config, {WEIGHTS: tensors})
    ours = peftfx.load(Layers().eval(), directory, inputs={"x": x})
    torch.testing.assert_close(ours(x), want(x), rtol=1e-5, atol=1e-5)
    assert (want(x) - before).abs().max() > 1e-2
    ours.merge()
    torch.testing.assert_close(ours.remove()(x), want(x), rtol=1e-5, atol=1e-5)
    return config


@pytest.mark.parametrize("form", ["1full", "1full t2", "1ab", "2full", "1ab t2"])
@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_"])
def test_a_lokr_of_lycoris(form: str, prefix: str, tmp_path: Path) -> None:
    """Ranks and alphas differ; where neither factor is a product, LyCORIS ignores alpha."""
    tensors, updates = {}, {}
    for number, place in enumerate(SIZES):
        r, alpha = 1 + (form == "1full" and place in ("low", "high")), 0.5 + number
        parts = lokr(place, form, r)
        scale = 1.0 if form == "2full" else alpha / r
        updates[place] = scale * dense(place, parts, Layers().get_submodule(place).weight.shape)  # type: ignore[arg-type]
        own = {**parts, "alpha": torch.tensor(alpha)}
        tensors |= {f"{prefix}{place}.{name}": t for name, t in own.items()}
    save_file(tensors, tmp_path / "lokr.safetensors")
    config = compare(updates, tmp_path / "lokr.safetensors", tmp_path / "read")
    assert config["peft_type"] == "LOKR"
    assert config["decompose_factor"] == 4


def test_a_lora_whose_conv_has_a_core(tmp_path: Path) -> None:
    """LoCon's `lora_mid` is a conv between two of size 1."""
    down, core, up = torch.randn(2, 6, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(8, 2, 1, 1)
    a, b = torch.randn(3, 12), torch.randn(18, 3)
    conv = nn.functional.conv2d
    x = torch.randn(1, 6, 5, 5)
    updates = {"wide": 0.5 * torch.einsum("or,rsij,sn->onij", up[:, :, 0, 0], core, down[:, :, 0, 0]), "low": b @ a}
    by_three = 0.5 * conv(conv(conv(x, down), core, stride=2, padding=1), up)
    torch.testing.assert_close(conv(x, updates["wide"], stride=2, padding=1), by_three, rtol=1e-4, atol=1e-4)
    found = {"wide.lora_down.weight": down, "wide.lora_mid.weight": core, "wide.lora_up.weight": up}
    found |= {"wide.alpha": torch.tensor(1.0), "low.lora_down.weight": a, "low.lora_up.weight": b}
    save_file({f"lora_unet_{name}": t for name, t in found.items()}, tmp_path / "locon.safetensors")
    assert compare(updates, tmp_path / "locon.safetensors", tmp_path / "read")["peft_type"] == "LORA"


def test_what_is_no_whole_adapter_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    whole = {f"lora_unet_low.{name}": t for name, t in lokr("low", "1full", 1).items()}

    def refused(match: str, tensors: Mapping[str, Tensor]) -> None:
        save_file(dict(tensors), file)
        with pytest.raises(PeftfxError, match=match):
            as_peft(file, Layers())

    refused(
        "modules of it are not this model's, or have more or less", {k: t for k, t in whole.items() if "w2_a" not in k}
    )
    refused("modules of it are not this model's", whole | {"lora_unet_low.dora_scale": torch.ones(18, 1)})
    refused("modules of it are not this model's", whole | {"lora_unet_low.scalar": torch.ones(1)})
    lora = {"lora_unet_high.lora_down.weight": torch.ones(2, 18), "lora_unet_high.lora_up.weight": torch.ones(8, 2)}
    refused("an adapter of HF PEFT is of one kind", whole | lora)
    loha = {f"lora_unet_high.hada_w{n}_{h}": torch.ones(*s) for n in "12" for h, s in (("a", (8, 2)), ("b", (2, 18)))}
    refused("an adapter of HF PEFT is of one kind", whole | loha)
    odd = {"lokr_w1": torch.ones(9, 4), "lokr_w2": torch.ones(2, 3)}
    other = {f"lora_unet_high.{name}": t for name, t in lokr("high", "1full", 1).items()}
    refused("lora_unet_low.alpha has 2 numbers", whole | {"lora_unet_low.alpha": torch.ones(2)})
    refused("of other sizes than HF PEFT makes", other | {f"lora_unet_low.{name}": t for name, t in odd.items()})
