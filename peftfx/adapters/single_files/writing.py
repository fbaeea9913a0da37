"""Writing a LoRA or a DoRA as the tensors of one file, as kohya's trainers or diffusers write them."""

from __future__ import annotations

import torch
from torch import Tensor

from peftfx.adapters.adapter import Adapter
from peftfx.adapters.single_files.keys import ALPHA, BIAS, DOWN, SCALE, UP
from peftfx.contract.common.lora.dora import MAGNITUDE
from peftfx.contract.common.lora.factors import B_BIAS
from peftfx.errors import PeftfxError
from peftfx.methods.lora import LoRA

KOHYA, DIFFUSERS = "kohya", "diffusers"


@torch.no_grad()
def as_single_file(adapter: Adapter, how: str, prefix: str) -> dict[str, Tensor]:
    """Return the tensors of a LoRA or a DoRA by the names of a single file; diffusers' have the scale in B.

    Raises:
        PeftfxError: the adapter is more than a LoRA or a DoRA on whole linear and conv layers; such files hold only
            these.
    """
    found: dict[str, Tensor] = {}
    for placement in adapter.placements:
        at, method = placement.on_weight, placement.method
        p = {} if at is None else {name: t.detach().contiguous() for name, t in adapter.params(at).items()}
        plain = p.keys() - {MAGNITUDE, B_BIAS} == {"lora_A", "lora_B"}
        if at is None or at.part or not isinstance(method, LoRA) or not plain or method.use_bdlora:
            what = f"a single file holds LoRAs and DoRAs of whole layers, and no {type(method).__name__} as this one"
            raise PeftfxError(what, placement.site.path, "convert the adapter to a LoRA first")
        if at.site.kind not in ("linear", "conv"):
            raise PeftfxError(f"a single file holds no LoRA of a {at.site.kind}", at.site.path, "train it without")
        if how == KOHYA and B_BIAS in p:
            raise PeftfxError("kohya's format has no biases of B (lora_bias)", at.site.path, "use --to diffusers")
        a, b, path = p["lora_A"], p["lora_B"], at.site.path
        if how == KOHYA:
            stem = f"{prefix}_{path.replace('.', '_')}"
            found |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
            found[f"{stem}.{ALPHA}"] = torch.tensor(method.scaling * method.r)
            if MAGNITUDE in p:
                found[f"{stem}{SCALE}"] = p[MAGNITUDE].reshape(-1, *(1,) * (a.ndim - 1))
        else:
            found |= {f"{prefix}.{path}.{DOWN}": a, f"{prefix}.{path}.{UP}": b * method.scaling}
            if MAGNITUDE in p:
                found[f"{prefix}.{path}.{MAGNITUDE}"] = p[MAGNITUDE]
            if B_BIAS in p:
                found[f"{prefix}.{path}.{BIAS}"] = p[B_BIAS] * method.scaling
    if adapter.overrides:
        raise PeftfxError(
            "a single file cannot hold copies of the base's tensors",
            adapter.overrides[0].key,
            "train the adapter without them",
        )
    return found
