"""A model adapted by `peft`: the adapter that a check loads, and whose outputs it is held against."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import peft
import torch
import transformers as hf
from peft.tuners.lora import LoraLayer
from support.adapted import randomise
from support.parity import outputs
from torch import Tensor, nn

from peftfx.bases.example_inputs import example_inputs


class NotBuilt(Exception):
    """The model does not run by itself, or `peft` does not adapt it."""


def adapted_by_peft(built: Callable[[], nn.Module], task_type: str | None, directory: Path) -> nn.Module:
    """A model with a random LoRA on all that is linear (or on its convolutions), which is saved to a directory.

    Args:
        built: makes the base, the same each time.
        task_type: `peft`'s name of the task.
        directory: where `peft` saves the adapter.
    """
    base = built()
    run = _run(base)
    targets = [n for n, m in run.items() if _multiplies(m)]
    if task_type == "SEQ_CLS":  # `peft` trains copies of these
        targets = [n for n in targets if not n.endswith(("classifier", "score"))]
    convs = [n for n, m in run.items() if isinstance(m, nn.Conv2d) and m.groups == 1]
    try:
        try:
            made = _with_lora(base, targets or convs, task_type)
        except ValueError as error:
            if "Mamba" not in str(error):
                raise
            targets = [n for n in targets if n.rpartition(".")[2] != "out_proj"]  # that `peft` refuses there
            made = _with_lora(built(), targets, task_type)
        if idle := _idle(made, built()):
            made = _with_lora(built(), [n for n in targets or convs if n not in idle], task_type)
        made.save_pretrained(str(directory), save_embedding_layers=False)
    except Exception as error:
        raise NotBuilt(f"peft: {line_of(error)}") from error
    return made


def _idle(made: nn.Module, base: nn.Module) -> set[str]:
    """The targets that a call does not run: the model's code runs the layers that `peft` has replaced."""
    layers = {n: m for n, m in made.get_base_model().named_modules() if isinstance(m, LoraLayer)}  # type: ignore[operator]
    run: set[nn.Module] = set()
    hooks = [layer.register_forward_hook(lambda module, *_: run.add(module)) for layer in layers.values()]
    outputs(made, example_inputs(base))
    for hook in hooks:
        hook.remove()
    return {name for name, layer in layers.items() if layer not in run}


def _multiplies(module: nn.Module) -> bool:
    """Whether a layer is a plain product: `peft` takes it for one, also where a subclass computes otherwise."""
    if not isinstance(module, nn.Linear):
        return isinstance(module, hf.pytorch_utils.Conv1D)
    if type(module).forward is nn.Linear.forward:
        return True
    x = torch.randn(2, 3, module.in_features)
    try:
        return torch.allclose(module(x), nn.functional.linear(x, module.weight, module.bias), atol=1e-5)
    except Exception:  # it takes other arguments
        return False


def _with_lora(base: nn.Module, targets: list[str], task_type: str | None) -> nn.Module:
    torch.manual_seed(1)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=targets, task_type=task_type)
    made: nn.Module = peft.get_peft_model(base, config).eval()
    randomise(made)
    return made


def _run(base: nn.Module) -> dict[str, nn.Module]:
    """The modules that a call of the model runs, but for the output embedding, which `all-linear` leaves out too."""
    run: set[nn.Module] = set()

    def note(module: nn.Module, _: object, output: object) -> None:
        if isinstance(output, Tensor):  # `peft`'s layer takes no others: a router may give two
            run.add(module)

    hooks = [module.register_forward_hook(note) for module in base.modules()]
    with torch.no_grad():
        base(**example_inputs(base))
    for hook in hooks:
        hook.remove()
    head = None
    with contextlib.suppress(NotImplementedError, AttributeError):
        head = base.get_output_embeddings()  # type: ignore[operator]
    return {n: m for n, m in base.named_modules() if m in run and m is not head}


def line_of(error: BaseException) -> str:
    """What an error says, up to the first line that does not end with a colon."""
    lines = [line.strip() for line in str(error).strip().splitlines()] or [repr(error)]
    more = next((i for i, line in enumerate(lines) if not line.endswith(":")), len(lines))
    return " ".join(lines[: more + 1])[:300]
