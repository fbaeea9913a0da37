"""The function `check`: runs the laws and the comparison with HF PEFT on one method, and reports the results."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

import peftfx.methods as table
from peftfx.contract.completeness import refuse_incomplete
from peftfx.contract.method import Method
from peftfx.contract.pattern import PatternMethod
from peftfx.errors import PeftfxError, first_line
from peftfx.patterns.pattern import remember
from peftfx.testing.extras import needed
from peftfx.testing.models import GivenModel

_MOST = 1500  #: the most characters of an error that broke a law


if TYPE_CHECKING:
    from peftfx.testing.cases import Choices
    from peftfx.testing.laws import Law


@dataclass(frozen=True)
class Finding:
    """The result of one law.

    Attributes:
        name: the law's name.
        text: the law's statement in words.
        broken: how the law was broken, and by which case; empty if the law holds.
        skipped: why the law was not tested; empty if it was.
    """

    name: str
    text: str
    broken: str = ""
    skipped: str = ""

    def __str__(self) -> str:
        mark = "broken" if self.broken else "skipped" if self.skipped else "holds"
        more = "".join(f"\n      {line}" for line in (self.broken or self.skipped).splitlines())
        return f"  {mark:8}{self.name}: {self.text}{more}"


@dataclass(frozen=True)
class CheckReport:
    """The results of `check` for one method."""

    method: str
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The findings of laws that do not hold."""
        return tuple(finding for finding in self.findings if finding.broken)

    def __str__(self) -> str:
        broken, skipped = len(self.broken), sum(bool(finding.skipped) for finding in self.findings)
        tried = len(self.findings) - skipped
        head = f"{self.method}: {broken} of {tried} laws broken" if broken else f"{self.method}: all {tried} laws hold"
        head = head if tried else f"{self.method}: no law was tried"
        head += f", {skipped} skipped" if skipped else ""
        return "\n".join([head, *map(str, self.findings)])


def check(
    cls: type[Method],
    choices: Mapping[str, Sequence[object]] | None = None,
    *,
    configs: Sequence[Mapping[str, object]] = ({},),
    whole: bool = False,
    model: nn.Module | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> CheckReport:
    """Test a method by every law that applies to it, and compare it with HF PEFT's method of the same type, if any.

    Args:
        cls: the class of the method.
        choices: the values to draw from, for options whose type does not tell them (a string, a dict). Options that are
            bools, numbers or `Literal` need no choices.
        configs: the options to compare with HF PEFT; one comparison for each.
        whole: whether to test all examples of each law; by default a simple and a random example.
        model: a model to test the laws on, in place of small random models, in float32 or bfloat16; it is not changed.
            Pattern methods need a model in which the pattern matches.
        inputs: the arguments of one call of that model: tensors whose first axis is the batch.

    Returns:
        The results; printed, they are one line for each law.

    Raises:
        AssertionError: a law is broken; the error's text is the report.
        PeftfxError: the class is not complete, no model has a site for the method, or hypothesis is not installed.
    """
    refuse_incomplete(cls)
    needed("hypothesis")
    from peftfx.testing.laws import LAWS

    with known(cls):
        spec = _given(cls, model, inputs)
        hold = functools.partial(_held, cls, choices, whole, spec)
        laws = (law for law in LAWS if law.is_about(cls) and (spec is None or law.least == 1))
        findings = [
            Finding(law.name, law.text, skipped=why)
            if (why := law.untested(cls))
            else _tried(law.name, law.text, functools.partial(hold, law))
            for law in laws
        ]
        findings += [_compared(cls, options) for options in configs]
    report = CheckReport(cls.__name__, tuple(findings))
    if report.broken:
        raise AssertionError(str(report))
    return report


def _held(cls: type[Method], choices: Choices | None, whole: bool, spec: GivenModel | None, law: Law) -> None:
    law.hold(cls, choices, whole=whole, spec=spec)


def _given(cls: type[Method], model: nn.Module | None, inputs: Mapping[str, Tensor] | None) -> GivenModel | None:
    """Return the caller's model as a spec for the laws, or None without a model."""
    if (model is None) != (inputs is None):
        raise PeftfxError("a model and its inputs go together", "model, inputs", "pass both, or neither")
    if model is None or inputs is None:
        if issubclass(cls, PatternMethod):
            hint = "pass model= and inputs=, the arguments of one call, of a model in which it matches"
            raise PeftfxError("laws of a pattern are tried where it matches", cls.__name__, hint)
        return None
    from peftfx.testing.pool import captured

    dtype = next((str(p.dtype) for p in model.parameters() if p.is_floating_point()), "torch.float32")
    spec = GivenModel((), dtype=dtype.removeprefix("torch."), model=model, example=inputs)  # type: ignore[arg-type]
    if not any(site.kind in cls.kinds for site in captured(spec).graph.sites):
        what = f"this model has no site that {cls.__name__} acts at"
        raise PeftfxError(what, type(model).__name__, "peftfx.inspect(model) shows its sites")
    return spec


def _tried(name: str, text: str, run: Callable[[], None]) -> Finding:
    try:
        run()
    except Exception as error:
        told = str(error) if isinstance(error, PeftfxError) else f"{type(error).__name__}: {first_line(error)}"
        return Finding(name, text, broken="\n".join([told, *getattr(error, "__notes__", ())])[:_MOST])
    return Finding(name, text)


def _compared(cls: type[Method], options: Mapping[str, object]) -> Finding:
    shown = f" with {', '.join(f'{k}={v!r}' for k, v in options.items())}" if options else ""
    name, text = "parity", f"HF PEFT computes the same, and trains by the same gradients, files both ways{shown}."
    if importlib.util.find_spec("peft") is None:
        return Finding(name, text, skipped="the package peft is not installed (pip install 'peftfx[testing]')")
    from peftfx.testing.parity import compare, config_class

    if config_class(cls) is None:
        return Finding(name, text, skipped=f"HF PEFT has no type {cls.peft_type}, or no weights that it adapts by it")
    return _tried(name, text, lambda: compare(cls, options))


@contextmanager
def known(cls: type[Method]) -> Iterator[None]:
    """Register the method's class under its type until the `with` block ends."""
    with table.forgetting_registered():
        table._registered[cls.peft_type] = cls
        if issubclass(cls, PatternMethod):
            remember(cls.pattern)
        yield
