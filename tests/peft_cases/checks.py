"""HF PEFT's cases, each run here and there: what has to be equal, and what is said where it is not.

A case is a small model, a method and its options; both sides have the same random adapter. What both give is compared
at sizes other than the example's: forward; merged in place; saved here and loaded there, and the other way round;
exported, in ONNX Runtime; and the gradient of each tensor of the adapter, in training, dropout included.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import peft
import peft.tuners.boft.layer as boft
import torch
from peft_cases.models import MODELS
from peft_cases.peft_is_wrong import Mend, mend_of
from safetensors.torch import load_file
from support.adapted import randomise
from support.parity import changed, farthest, outputs
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export import OnnxModel
from peftfx.model.adapted import AdaptedModel
from peftfx.rules.peft_files import WEIGHTS


class _BlockDiagonal:
    """What HF PEFT's kernel of BOFT computes, which is for CUDA alone: blocks [factors, blocks, size, size]."""

    apply = staticmethod(lambda blocks: torch.stack([torch.block_diag(*factor) for factor in blocks]))


boft.get_fbd_cuda, boft.FastBlockDiag = (lambda: True), _BlockDiagonal

TOLERANCE = 1e-5  #: what may differ, relative to the largest value
CHECKS = ("forward", "merged", "PEFT reads ours", "saved again", "ONNX Runtime", "gradients")
_ROWS = json.loads((Path(__file__).parent / "cases.json").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Case:
    """A row of HF PEFT's table: the method by its `peft_type`, a model of `models.py`, options of its config."""

    method: str
    model: str
    options: Mapping[str, object]

    def __str__(self) -> str:
        return f"{self.method}/{self.model}/{self.shown}"

    @property
    def shown(self) -> str:
        """The options in short."""
        return " ".join(f"{name}={json.dumps(value)}" for name, value in self.options.items())

    def config(self) -> peft.PeftConfig:
        """HF PEFT's config."""
        return peft.get_peft_config({"peft_type": self.method, **copy.deepcopy(dict(self.options))})


@dataclass
class Result:
    """What each check came to: `equal`, `refused`, `PEFT stops` or `PEFT is wrong`, else what is wrong; and notes."""

    checks: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def cases() -> list[Case]:
    """All of HF PEFT's rows; some are in its table twice."""
    return [Case(*row) for row in _ROWS]


def run(case: Case, made: Path) -> Result:
    """Run a case, its files in an empty directory."""
    bench, result = Bench(case, made), Result()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"peft\.")  # HF PEFT's own
        warnings.simplefilter("ignore", PeftfxWarning)
        for name, check in bench.checks().items():
            result.checks[name], note = _said(bench, check)
            result.notes |= {name: note} if note else {}
    return result


def _said(bench: Bench, check: Callable[[], float]) -> tuple[str, str]:
    """What a check came to, and a note."""
    bench.mend = None
    try:
        error = check()
        if error <= TOLERANCE:
            return "equal", ""
        bench.mend = mend_of(bench.case.options, bench.base)
        if bench.mend is not None and _told(check, bench.mend) <= TOLERANCE:
            return "PEFT is wrong", bench.mend.why
        return "differs", f"{error:.1e} of the largest value"
    except PeftfxError as refused:
        return "refused", refused.what
    except PeftStops as stops:
        return "PEFT stops", str(stops)
    except Exception as failed:  # of any kind: it is this case's result
        return "fails", f"{type(failed).__name__}: {_first_line(failed)}"


def _told(check: Callable[[], float], mend: Mend) -> float:
    """A check with HF PEFT mended. Where its outputs are others, a user has to be warned."""
    with warnings.catch_warnings(record=True, action="always") as said:
        error = check()
    assert not mend.told or any(issubclass(warning.category, PeftfxWarning) for warning in said), "nobody is told"
    return error


class PeftStops(Exception):
    """HF PEFT raises an error."""


class Bench:
    """A case set up: the base, HF PEFT's model of it, and ours, read from what HF PEFT saved."""

    def __init__(self, case: Case, made: Path) -> None:
        self.case, self.made, self.built = case, made, MODELS[case.model]
        self.base = self.built.module()
        self.example, *self.calls = self.built.calls()
        self.mend: Mend | None = None

    def checks(self) -> Mapping[str, Callable[[], float]]:
        """What is compared, by its name."""
        found = (self.forward, self.merged, self.read_by_peft, self.saved_again, self.served, self.gradients)
        return dict(zip(CHECKS, found, strict=True))

    def theirs(self) -> nn.Module:
        """HF PEFT's model, every adapter off its start, and saved."""
        with peft_runs():
            torch.manual_seed(2)
            theirs = peft.get_peft_model(copy.deepcopy(self.base), self.case.config())
            randomise(theirs)
            theirs.save_pretrained(str(self.made / "theirs"))
        return self._mended(theirs)

    def _loaded(self, name: str) -> nn.Module:
        """HF PEFT's model of what is in a directory."""
        with peft_runs():
            return self._mended(peft.PeftModel.from_pretrained(copy.deepcopy(self.base), str(self.made / name)))

    def _mended(self, theirs: nn.Module) -> nn.Module:
        if self.mend is not None:
            self.mend.apply(theirs)
        return theirs.eval()

    def ours(self) -> AdaptedModel:
        """The same adapter, read."""
        self.theirs()
        return peftfx.load(copy.deepcopy(self.base), self.made / "theirs", inputs=self.example).eval()

    def forward(self) -> float:
        """Ours against HF PEFT's."""
        return self._apart(self.ours(), self.theirs())

    def merged(self) -> float:
        """Ours merged into a copy of the base against HF PEFT's forward."""
        ours = self.ours()
        assert ours.merge().sites
        return self._apart(ours.remove(), self.theirs())

    def read_by_peft(self) -> float:
        """An adapter that we make and save, in HF PEFT, against ours."""
        ours = peftfx.transform(copy.deepcopy(self.base), self.case.config(), inputs=self.example).eval()
        randomise(ours)
        ours.save_pretrained(self.made / "ours")
        self.theirs()
        _same_keys(*(_once(load_file(self.made / name / WEIGHTS)) for name in ("ours", "theirs")))
        return self._apart(self._loaded("ours"), ours)

    def saved_again(self) -> float:
        """What we read from HF PEFT, saved again, in HF PEFT against the first."""
        self.ours().save_pretrained(self.made / "again")
        return self._apart(self._loaded("again"), self.theirs())

    def served(self) -> float:
        """ONNX Runtime on our export against HF PEFT."""
        self.ours().export(self.made / "out", view="forward", force=True)
        served, theirs = OnnxModel(self.made / "out"), self.theirs()
        return max(farthest(served(**call), given(theirs, call), call) for call in self.calls)

    def gradients(self) -> float:
        """Ours against HF PEFT's, in training: by the names that their tensors have in a file.

        One that is 0 but for rounding is compared in float64, where it is.
        """
        error = self._gradients(torch.float32)
        return error if error <= TOLERANCE else self._gradients(torch.float64)

    def _gradients(self, dtype: torch.dtype) -> float:
        call = {name: t.to(dtype) if t.is_floating_point() else t for name, t in self.calls[0].items()}
        ours, theirs = (backward(model.to(dtype).train(), call) for model in (self.ours(), self.theirs()))
        found, wanted = self._in_file(ours, lambda p: p.grad), self._in_file(theirs, lambda p: p.grad)
        _same_keys(found, wanted)
        # A file may have a multiple of what acts here; by the chain rule its gradient has the multiple's inverse.
        ones, zeros = self._in_file(ours, torch.ones_like), self._in_file(ours, torch.zeros_like)
        units = {name: ones[name] - zeros[name] for name in found}  # 0 for what is saved and not trained
        units = {name: torch.where(unit == 0, 1, unit) for name, unit in units.items()}
        return farthest({name: value / units[name] ** 2 for name, value in found.items()}, wanted, {})

    def _in_file(self, model: nn.Module, value: Callable[[Tensor], Tensor | None]) -> dict[str, Tensor]:
        """What is saved of a model whose trained parameters are replaced, each by a value of its own."""
        copied = copy.deepcopy(model)
        for p, other in zip(copied.parameters(), model.parameters(), strict=True):
            if p.requires_grad:
                found = value(other)
                p.data = torch.zeros_like(p) if found is None else found
        copied.save_pretrained(str(self.made / "values"))  # type: ignore[operator]
        return _once(load_file(self.made / "values" / WEIGHTS))

    def _apart(self, got: nn.Module, want: nn.Module) -> float:
        wanted = [given(want, call) for call in self.calls]
        pairs = zip(wanted, (outputs(self.base, call) for call in self.calls), strict=True)
        assert any(changed(*pair) for pair in pairs), "the adapter changes nothing"
        return max(farthest(given(got, call), w, call) for call, w in zip(self.calls, wanted, strict=True))


def given(model: nn.Module, call: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model gives; HF PEFT's may stop."""
    if not isinstance(model, peft.PeftModel):
        return outputs(model, call)
    with peft_runs():
        return outputs(model, call)


def backward(model: nn.Module, call: Mapping[str, Tensor]) -> nn.Module:
    """The model with gradients of a sum in which each output has its own weight, the same dropout drawn each time."""
    torch.manual_seed(5)
    weighed(model(**call)).backward()
    return model


def weighed(out: Tensor) -> Tensor:
    """The sum."""
    return (out * torch.linspace(-3, 3, out.numel(), dtype=out.dtype).view_as(out).sin()).sum()


def _once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a file without what it has again for each module: RandLoRA's bases, which all modules share."""
    return {
        n: t for n, t in tensors.items() if n == (own := f"base_model.{n.rpartition('.')[2]}") or own not in tensors
    }


def _same_keys(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys(), f"in one file alone: {', '.join(sorted(ours.keys() ^ theirs.keys()))}"


@contextmanager
def peft_runs() -> Iterator[None]:
    """Inside, an error is HF PEFT's."""
    try:
        yield
    except Exception as error:  # of any kind
        raise PeftStops(f"{type(error).__name__}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
