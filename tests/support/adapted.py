"""Adapted models beside those of `peft`, with the same random adapters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import torch
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.model.adapted import AdaptedModel


def randomise(model: nn.Module, seed: int = 7) -> None:
    """Trainable parameters off their initial values: an adapter that is the identity hides every bug."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def adapt(name: str, rules: object, adapter_name: str = "default", road: str | None = None) -> AdaptedModel:
    """A model of the zoo with random adapters."""
    entry = ZOO[name]
    inputs = entry.inputs() if entry.custom else None
    adapted = peftfx.transform(entry.build(), rules, adapter_name, inputs=inputs, road=road)
    randomise(adapted)
    return adapted


def trained(model: nn.Module, loss: Callable[[], Tensor], *, rate: float = 5e-3) -> list[float]:
    """The losses of four steps of AdamW, in each of which torch draws anew."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    seen = []
    for step in range(4):
        torch.manual_seed(step)
        found = loss()
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(found.item())
    return seen


def both(name: str, directory: Path, **options: object) -> tuple[AdaptedModel, nn.Module]:
    """One base and one random adapter twice: ours, loaded from what `peft` saved, and `peft`'s own."""
    theirs = peft.get_peft_model(ZOO[name].build(), peft.LoraConfig(**{**QUERY_VALUE, **options}))
    randomise(theirs)
    theirs.save_pretrained(str(directory))
    return peftfx.load(ZOO[name].build(), directory), theirs.eval()


def our_name(theirs: str) -> str:
    """The name of a tensor of `peft`'s in our adapter."""
    name = theirs.removeprefix("base_model.model.")
    for part in (".modules_to_save.default", ".base_layer", ".default"):
        name = name.replace(part, "")
    return name.removesuffix(".weight") if ".lora_" in name else f"saved.{name}"


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def step(model: nn.Module, inputs: dict[str, Tensor], run: Callable[..., object] | None = None) -> dict[str, Tensor]:
    """The loss and the gradients of a call, from one seed; `run` calls the model, as a compiled one does."""
    model.zero_grad()
    torch.manual_seed(3)
    loss = (model if run is None else run)(**inputs).loss  # type: ignore[attr-defined]
    loss.backward()
    return {"loss": loss.detach(), **{name: g.clone() for name, g in gradients(model).items()}}


CONVS = ("grouped", "dilated", "reflected")


class Convs(nn.Module):
    """A grouped, a dilated and a reflect-padded convolution in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=4)
        self.dilated = nn.Conv2d(12, 8, 3, padding="same", dilation=2)
        self.reflected = nn.Conv2d(8, 6, (3, 5), padding=(1, 2), padding_mode="reflect", stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.reflected(torch.tanh(self.dilated(torch.tanh(self.grouped(x)))))


QUERY_VALUE = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"]}
