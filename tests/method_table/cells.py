"""The table of methods: each method of HF PEFT's on four models, and what has to hold in each cell.

Both sides have the same random adapter. Forward: HF PEFT reads what is saved here, and computes the same at two sizes.
Gradients: of each tensor of its file, read back. Files: HF PEFT saves what it read, the same tensors by the same names.
In ONNX Runtime the same numbers come from an export of its own, from a slot of one graph, and from a row of a batch.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from support.adapted import randomise
from support.parity import UNSEEN, changed, farthest, outputs
from support.zoo import ZOO
from torch import Tensor, nn

from peftfx import runtime
from peftfx.contract.sequence import SequenceMethod
from peftfx.errors import PeftfxError
from peftfx.export import OnnxModel
from peftfx.export.slots.adapter_export import export_adapter
from peftfx.export_options.values import DEFAULT_SLOTS, Slots
from peftfx.methods import method_named, methods
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare
from peftfx.rules.peft_files import WEIGHTS
from peftfx.testing.parity import same_gradients

MODELS: Mapping[str, str] = {"LLaMA": "llama", "BERT": "bert", "T5": "t5", "ViT": "vit"}
CHECKS = ("forward", "gradients", "files both ways", "ONNX Runtime", "swappable", "batched")
IN_PEFT, IN_ORT = 1e-5, 1e-4  #: what may differ, relative to the largest value
#: Options of methods whose defaults are for larger models; `target` of those that act at other layers by default.
OPTIONS: Mapping[str, Mapping[str, object]] = {
    "ADALORA": {"init_r": 4, "target_r": 2, "total_step": 20, "tinit": 2, "tfinal": 2},
    "ADAMSS": {"r": 8, "num_subspaces": 3},
    "ADAPTION_PROMPT": {"adapter_len": 4},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 4},
    "CPT": {"cpt_token_ids": (4, 5, 6)},
    "FOURIERFT": {"n_frequency": 20},
    "MISS": {"r": 4},
    "OFT": {"oft_block_size": 4, "r": 0},
    "POLY": {"r": 2, "n_skills": 2},
    "PSOFT": {"r": 4},
    "PVERA": {"r": 4},
    "RANDLORA": {"r": 4},
    "ROAD": {"group_size": 4},
    "SHIRA": {"r": 1},
    "TRAINABLE_TOKENS": {"token_indices": (5, 7)},
    "UNILORA": {"theta_d_length": 50},
    "VBLORA": {"vector_length": 4, "num_vectors": 8},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 20},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "CARTRIDGE": {"num_virtual_tokens": 3, "num_frozen_tokens": 1},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 16},
}


#: Where the gradients that HF PEFT writes out are not those of its own forward.
WRONG: Mapping[str, str] = {
    "C3A": "HF PEFT writes out the gradient of its kernels, and it is not that of its forward (gradcheck in float64: "
    "`test_gradients_that_hf_peft_writes_out_are_not_those_of_its_forward`)."
}


class PeftStops(Exception):
    """HF PEFT raises an error."""


class PeftIsWrong(Exception):
    """HF PEFT's numbers are not those of its own formula."""


@dataclass
class Result:
    """What each check came to: `equal`, `alone` where HF PEFT stops, `PEFT is wrong` or `refused`."""

    checks: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def kinds() -> list[str]:
    """The methods that HF PEFT has too."""
    return sorted(kind.value for kind in peft.PeftType if kind.value in methods())


EVERYWHERE = f"{DEFAULT_SLOTS} | embedding.token | head"  #: the layers at which some method acts by default


class Bench:
    """A model of the table, captured once, and one graph of it whose slots serve all methods."""

    def __init__(self, model: str, directory: Path) -> None:
        self.entry, self.directory = ZOO[MODELS[model]], directory
        self.base = self.entry.build()
        self.untouched = copy.deepcopy(self.base)
        self.adapted: AdaptedModel = bare(self.base)
        self.calls = [self.entry.inputs(b, s, 3 + i, model=self.base) for i, (b, s) in enumerate(UNSEEN)]

    @functools.cached_property
    def graph(self) -> Path:
        """The graph with slots, where adapters are put when it runs."""
        bare(copy.deepcopy(self.untouched)).export(self.directory / "graph", view="forward", slots=Slots(EVERYWHERE))
        return self.directory / "graph"

    def run(self, kind: str, made: Path) -> Result:
        """Run one method's checks, its files in an empty directory."""
        try:
            return self._run(kind, made)
        finally:
            self.adapted.remove()
            self.base.load_state_dict(self.untouched.state_dict())

    def _run(self, kind: str, made: Path) -> Result:
        ours, result = self.adapted.eval(), Result()
        try:
            ours.add_adapter("cell", method_named(kind).from_options(OPTIONS.get(kind, {})), seed=0)
        except PeftfxError as error:
            return Result(dict.fromkeys(CHECKS, "refused"), dict.fromkeys(CHECKS, error.what))
        randomise(ours)
        want = [outputs(ours, call) for call in self.calls]
        plain = [outputs(self.untouched, call) for call in self.calls]
        assert any(changed(a, b) for a, b in zip(want, plain, strict=True)), "the adapter changes nothing"
        ours.save_pretrained(made / "ours")
        cell = _Cell(self, kind, made, want)
        checks = (cell.forward, cell.gradients, cell.files, cell.served, cell.swappable, cell.batched)
        for name, check in zip(CHECKS, checks, strict=True):
            result.checks[name], note = _said(check)
            result.notes |= {name: note} if note else {}
        return result


def _said(check: Callable[[], str]) -> tuple[str, str]:
    try:
        note = check()
    except PeftfxError as refused:
        return "refused", refused.what
    except PeftStops as stops:
        return "alone", str(stops)
    except PeftIsWrong as wrong:
        return "PEFT is wrong", str(wrong)
    return "equal", note


@dataclass
class _Cell:
    """One method on one model, its adapter active and saved."""

    bench: Bench
    kind: str
    made: Path
    want: list[dict[str, Tensor]]

    @functools.cached_property
    def theirs(self) -> nn.Module:
        """HF PEFT's model, with the adapter read from our file."""
        try:
            theirs = peft.PeftModel.from_pretrained(
                copy.deepcopy(self.bench.untouched), str(self.made / "ours"), is_trainable=not self.is_prompt
            ).eval()
            for call in self.bench.calls:
                outputs(self.run_of(theirs), self.beside(call))
        except Exception as error:  # of any kind: it is HF PEFT's, or the model's under it
            raise PeftStops(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:160]) from error
        return theirs

    @property
    def is_prompt(self) -> bool:
        return issubclass(method_named(self.kind), SequenceMethod)

    def run_of(self, theirs: nn.Module) -> nn.Module:
        """What is called: HF PEFT's models of a task pass no `task_ids` on to layers."""
        return theirs.base_model if self.kind == "POLY" else theirs  # type: ignore[return-value]

    def beside(self, call: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A call, with the task of each row where HF PEFT asks for it."""
        (method,) = self.bench.adapted.adapter("cell").rules
        rows = len(next(iter(call.values())))
        return {**call, **{name: torch.zeros(rows, dtype=torch.long) for name in method.inputs}}

    def forward(self) -> str:
        for call, want in zip(self.bench.calls, self.want, strict=True):
            found = outputs(self.run_of(self.theirs), self.beside(call))
            apart = farthest(found, want, call)
            assert apart <= IN_PEFT or apart <= 2 * self._noise(call, found), f"{apart:.1e}"
        return ""

    def _noise(self, call: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> float:
        """Return how far HF PEFT's own model in float32 is from the same model in float64."""
        exact = outputs(self.run_of(copy.deepcopy(self.theirs).double()), self.beside(call))
        return farthest(exact, found, call)

    def gradients(self) -> str:
        if self.is_prompt:
            raise PeftStops("HF PEFT trains no prompt that it has read")
        theirs, ours = self.run_of(self.theirs), self.bench.adapted
        ours.load_adapter(self.made / "ours", "back")
        try:
            call = self.beside(self.bench.calls[0])
            for model in (ours, theirs):
                _first(model(**call)).square().sum().backward()
            same_gradients(ours.adapter("back"), theirs)
        except AssertionError as error:
            if self.kind not in WRONG:
                raise
            raise PeftIsWrong(WRONG[self.kind]) from error
        finally:
            ours.remove("back")
            ours.set_adapter("cell")
        return ""

    def files(self) -> str:
        self.theirs.save_pretrained(str(self.made / "theirs"))  # type: ignore[operator]
        mine, back = (load_file(self.made / name / WEIGHTS) for name in ("ours", "theirs"))
        again = {k: t for k, t in back.items() if k in mine or f"base_model.{k.rpartition('.')[2]}" not in mine}
        assert mine.keys() == again.keys(), sorted(mine.keys() ^ again.keys())[:4]
        assert all(torch.equal(t, again[name]) for name, t in mine.items())
        ours = self.bench.adapted
        ours.load_adapter(self.made / "theirs", "back")
        try:
            for call, want in zip(self.bench.calls, self.want, strict=True):
                assert farthest(outputs(ours, call), want, call) <= IN_PEFT
        finally:
            ours.remove("back")
            ours.set_adapter("cell")
        return ""

    def served(self) -> str:
        report = self.bench.adapted.export(self.made / "out", view="forward")
        self._same(OnnxModel(self.made / "out"))
        return "" if report.merged or report.folded else "beside the weights"

    def swappable(self) -> str:
        path = export_adapter(self.bench.adapted, self.bench.graph, self.made / "adapter", check=False)
        served = runtime.load(self.bench.graph)
        served.set_adapter(served.load_adapter(path))
        self._same(served)
        return ""

    def batched(self) -> str:
        self.bench.adapted.export(self.made / "rows", view="forward", batched=["cell"])
        served = OnnxModel(self.made / "rows")
        for call, want in zip(self.bench.calls, self.want, strict=True):
            rows = len(next(iter(call.values())))
            got = served(**call, adapter_ids=torch.zeros(rows, dtype=torch.long))
            found = {name.removesuffix(".output"): value for name, value in got.items()}
            own = {n: v[tuple(slice(size) for size in want[n].shape)] for n, v in found.items() if n in want}
            assert farthest(own, want, call) <= IN_ORT
        return ""

    def _same(self, served: Callable[..., Mapping[str, Tensor]]) -> None:
        for call, want in zip(self.bench.calls, self.want, strict=True):
            found = {n.removesuffix(".output"): torch.as_tensor(v) for n, v in served(**call).items()}
            apart = farthest(found, want, call)
            assert apart <= IN_ORT, f"{apart:.1e}"


def _first(output: object) -> Tensor:
    found = output.get("logits") if isinstance(output, dict) else None
    assert isinstance(found, Tensor)
    return found
