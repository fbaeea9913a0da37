"""Every law catches the wrong method made for it, and holds for the right method that it was made from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from laws import breakers as wrong
from laws import frame as law_frame
from laws import statements as laws
from peftfx.testing.blocks import Attention, Dense
from peftfx.testing.cases import Case
from peftfx.testing.models import Text

from peftfx.contract.attention import AttentionMethod
from peftfx.contract.method import Method, WeightMethod
from peftfx.passes import Insert, PassResult, Remove
from peftfx.passes.base import REGION

CASE = Case(Text((Dense(), Dense())), batch=3, sequence=4)
TARGET = ("blocks.0", "blocks.1")

ATTENDING = Case(Text((Attention(), Attention("softmax", "heads"))), batch=3, sequence=4)

BROKEN: tuple[tuple[Callable[..., None], type[WeightMethod | AttentionMethod]], ...] = (
    (laws.identity, wrong.StartsAtRandom),
    (laws.fold, wrong.ForgetsTheBias),
    (laws.merge, wrong.FoldsInPlace),
    (laws.merge_in_place, wrong.ForgetsTheBias),
    (laws.remove, wrong.MovesTheBase),
    (laws.idempotence, wrong.IgnoresTheSeed),
    (laws.commute, wrong.CountsSites),
    (law_frame.gradients, wrong.DecaysTheBase),
    (law_frame.gradients, wrong.TrainsAConstant),
    (laws.save_and_load, wrong.SavesHalf),
    (laws.save_and_load, wrong.SharesAnotherEachTime),
    (laws.sizes, wrong.LooksAtTheBatch),
    (laws.onnx, wrong.IsNoisyInEval),
    (laws.identity, wrong.StartsWithAnOpenGate),
    (laws.merge, wrong.PromptsAtRandom),
    (laws.remove, wrong.ScalesTheKeys),
    (laws.idempotence, wrong.DrawsForItself),
    (laws.commute, wrong.CountsAttentions),
    (law_frame.gradients, wrong.DetachesThePrompt),
    (laws.save_and_load, wrong.SavesNoGate),
    (laws.sizes, wrong.MixesRows),
    (laws.onnx, wrong.PromptsAtRandom),
)


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading finds the methods of these tests by their type, too."""
    monkeypatch.setattr("peftfx.rules.peft_files.method_named", lambda _: Loaded.cls)


class Loaded:
    """The class that a checkpoint of these tests is of."""

    cls: type[Method] = wrong.Scale


@pytest.mark.parametrize(("law", "cls"), BROKEN, ids=[f"{law.__name__}-{cls.__name__}" for law, cls in BROKEN])
def test_the_law_catches_its_breaker_and_no_right_method(
    law: Callable[..., None], cls: type[WeightMethod | AttentionMethod]
) -> None:
    right, case = (wrong.Scale, CASE) if issubclass(cls, wrong.Scale) else (wrong.Glance, ATTENDING)
    Loaded.cls = right
    law(case, right(target=TARGET))
    Loaded.cls = cls
    with pytest.raises(AssertionError):
        law(case, cls(target=("blocks.1",) if law is law_frame.gradients else TARGET))


def test_sites_found_by_name_are_caught() -> None:
    case = Case(Text((Attention("softmax"),)))
    laws.roles(case)
    with pytest.raises(AssertionError):
        laws.roles(case, wrong.sites_by_name)


def test_an_insertion_that_changes_its_surroundings_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Careless(Insert):
        def __call__(self, graph: object) -> PassResult:
            result = super().__call__(graph)
            for node in result.graph.nodes():
                if "linear" in str(node.target) and REGION not in node.meta:
                    node.args = node.args[:2]
            return result

    method = wrong.Scale(target=TARGET)
    law_frame.frame(CASE, method)
    monkeypatch.setattr("peftfx.model.graph_cache.Insert", Careless)
    with pytest.raises(AssertionError):
        law_frame.frame(CASE, method)


def test_a_removal_that_leaves_something_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    laws.remove_one(CASE, wrong.Scale(target=TARGET))
    monkeypatch.setattr(Remove, "_mine", lambda self, adapter: True)
    with pytest.raises(AssertionError):
        laws.remove_one(CASE, wrong.Scale(target=TARGET))
