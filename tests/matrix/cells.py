"""The matrix: every task, model and method, and what has to hold in each of its cells.

A cell is: transform; gradients reach the adapter and nothing else; ten steps lower the loss; saved, loaded by `peft`
and back, the outputs are equal; merged (or folded), exported as the command line does, and served by ONNX Runtime, they
are equal at two sizes that nothing was captured at. `matrix.csv` has the cells, `matrix_page.py` the command.
"""

from __future__ import annotations

import copy
import csv
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from matrix.against_peft import PeftCannot, compared
from matrix.models import entry, in_transformers
from support.adapted import randomise
from support.parity import UNSEEN, changed, farthest, outputs
from support.zoo import Entry
from torch import Tensor
from torch.utils import _pytree as pytree

import peftfx
from peftfx.bases.guests import own_parameters
from peftfx.contract.method import Method
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.export import OnnxModel
from peftfx.export.command import export_directory
from peftfx.methods import method_named, methods
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare

STEPS = 10
IN_PEFT, IN_ORT = 1e-5, 1e-4  #: what may differ, relative to the largest value
SOFT: Mapping[str, object] = {"num_virtual_tokens": 4}
#: The matrix's names of methods: HF PEFT's type, and options; where they act is left to each method.
METHODS: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "LoRA": ("LORA", {"r": 4, "lora_alpha": 6}),
    "Prefix Tuning": ("PREFIX_TUNING", SOFT),
    "P-Tuning": ("P_TUNING", {**SOFT, "encoder_hidden_size": 24}),
    "Prompt Tuning": ("PROMPT_TUNING", SOFT),
    "IA3": ("IA3", {}),
    "AdaLoRA": ("ADALORA", {"init_r": 4, "target_r": 2, "total_step": 20, "tinit": 2, "tfinal": 2}),
    "LLaMA-Adapter": ("ADAPTION_PROMPT", {"adapter_len": 4, "adapter_layers": 2}),
}


@dataclass(frozen=True)
class Cell:
    """A task, a model and a method, by the matrix's names; `seed` says whether HF PEFT's own table has it."""

    task: str
    model: str
    method: str
    seed: bool

    def __str__(self) -> str:
        return f"{self.task}/{self.model}/{self.method}"

    def rule(self) -> Method:
        """The method with the matrix's options."""
        kind, options = METHODS[self.method]
        return method_named(kind).from_options(options)


@dataclass(frozen=True)
class Result:
    """What a cell came to.

    Attributes:
        status: `equal` to HF PEFT, `alone` where HF PEFT stops, `differs` from it, or `refused`.
        note: HF PEFT's error, how it differs, or the refusal.
        errors: what was measured, relative to the largest value.
    """

    status: Literal["equal", "alone", "differs", "refused"]
    note: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)


def cells() -> list[Cell]:
    """All cells whose methods there are."""
    with (Path(__file__).parent / "matrix.csv").open(encoding="utf-8") as file:
        rows = [Cell(r["task"], r["model"], r["method"], r["in_seed"] == "yes") for r in csv.DictReader(file)]
    return [cell for cell in rows if METHODS[cell.method][0] in methods()]


class Bench:
    """A model of the matrix, captured, its cells run one after the other: a view is captured once for all of them."""

    def __init__(self, task: str, model: str, directory: Path) -> None:
        self.entry: Entry = entry(task, model)
        self.base, self.directory = self.entry.build(), directory
        self.untouched = copy.deepcopy(self.base)
        self.base.save_pretrained(directory / "base")  # type: ignore[operator]
        self.adapted: AdaptedModel = bare(self.base)
        self.calls = [self.entry.inputs(b, s, 3 + i, model=self.base) for i, (b, s) in enumerate(UNSEEN)]

    def run(self, cell: Cell) -> Result:
        """Run a cell. A rule that is refused is a result; whatever is wrong behind that is raised."""
        adapted = self.adapted.eval()
        try:
            adapted.add_adapter("cell", cell.rule(), seed=0)
        except PeftfxError as error:
            return Result("refused", error.what)
        try:
            with tempfile.TemporaryDirectory(dir=self.directory) as made:
                return self._check(adapted, Path(made))
        finally:
            adapted.remove()
            self.base.load_state_dict(self.untouched.state_dict())  # norms that count in training change their buffers

    def _check(self, adapted: AdaptedModel, made: Path) -> Result:
        randomise(adapted)
        falls(adapted, self._call(*UNSEEN[0], seed=1, labels=True))
        self.base.load_state_dict(self.untouched.state_dict())
        want = [outputs(adapted, call) for call in self.calls]
        for a, b in zip(want, (outputs(self.untouched, call) for call in self.calls), strict=True):
            assert changed(a, b), "the adapter changes nothing"
        adapted.save_pretrained(made / "adapter")
        errors = {"ONNX Runtime": self._served(made, want)}
        if isinstance(adapted.adapter("cell").rules[0], WeightMethod):
            errors["merged"] = self._merged(adapted, want)
        for name, error in errors.items():
            assert error <= IN_ORT, f"{name}: {error:.1e}"
        try:
            errors["peft"], status, note = compared(adapted, self.untouched, made, self.calls, IN_PEFT)
        except PeftCannot as cannot:
            return Result("alone", str(cannot), errors)
        return Result(status, note, errors)

    def _call(self, batch: int, sequence: int, *, seed: int, labels: bool) -> dict[str, Tensor]:
        return self.entry.inputs(batch, sequence, seed, model=self.base, labels=labels)

    def _served(self, made: Path, want: list[dict[str, Tensor]]) -> float:
        if in_transformers(self.base):
            base = self.directory / "base"
            report = export_directory(
                base, made / "out", adapter=made / "adapter", task=self.entry.task, view="forward"
            )
        else:  # a class that no directory names
            report = peftfx.load(copy.deepcopy(self.untouched), made / "adapter").export(made / "out", view="forward")
        assert report.merged or report.folded  # type: ignore[attr-defined]
        served = OnnxModel(made / "out")
        got = [{n.removesuffix(".output"): v for n, v in served(**call).items()} for call in self.calls]
        return max(farthest(g, w, call) for g, w, call in zip(got, want, self.calls, strict=True))

    def _merged(self, adapted: AdaptedModel, want: list[dict[str, Tensor]]) -> float:
        merged = copy.deepcopy(adapted)
        assert merged.merge().sites
        module = merged.remove()
        return max(farthest(outputs(module, c), w, c) for c, w in zip(self.calls, want, strict=True))


def falls(adapted: AdaptedModel, call: Mapping[str, Tensor]) -> None:
    """Ten steps lower the loss, by gradients of the adapter alone; dropout is on, and the same in each step."""
    adapted.train()
    own = dict(adapted.adapters.named_parameters())
    trained = [p for p in own.values() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for step in range(STEPS + 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            loss = loss_of(adapted(**call))
        losses.append(loss.item())
        loss.backward()
        if step == 0:
            idle = [name for name, p in own.items() if p.requires_grad and (p.grad is None or not p.grad.any())]
            assert not idle, f"no gradient reaches {idle}"
            assert all(p.grad is None for _, p in own_parameters(adapted.base))
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    assert losses[-1] < losses[0], losses


def loss_of(output: object) -> Tensor:
    """The model's own loss; of one that has none, the mean square of what it returns."""
    own = getattr(output, "loss", None)
    return own if isinstance(own, Tensor) else pytree.tree_leaves(output)[0].square().mean()
