"""Every law catches the wrong method made for it, and holds for the right method that it was made from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from laws import breakers as wrong

from peftfx.contract.attention import AttentionMethod
from peftfx.contract.method import WeightMethod
from peftfx.contract.sequence import SequenceMethod
from peftfx.errors import PeftfxError
from peftfx.passes import Insert, PassResult, Remove
from peftfx.passes.base import REGION
from peftfx.testing import frame as law_frame
from peftfx.testing import prompts as law_prompts
from peftfx.testing import statements as laws
from peftfx.testing.blocks import Attention, Dense
from peftfx.testing.cases import Case
from peftfx.testing.models import Causal, Text
from peftfx.testing.registered import known

CASE = Case(Text((Dense(), Dense())), batch=3, sequence=4)
TARGET = ("blocks.0", "blocks.1")

ATTENDING = Case(Text((Attention(), Attention("softmax", "heads"))), batch=3, sequence=4)
PROMPTED = Case(Causal(()), batch=3, sequence=4)

BROKEN: tuple[tuple[Callable[..., None], type[WeightMethod | AttentionMethod | SequenceMethod]], ...] = (
    (laws.identity, wrong.StartsAtRandom),
    (laws.fold, wrong.ForgetsTheBias),
    (laws.merge, wrong.FoldsInPlace),
    (laws.merge_in_place, wrong.ForgetsTheBias),
    (laws.remove, wrong.MovesTheBase),
    (laws.idempotence, wrong.IgnoresTheSeed),
    (laws.commute, wrong.CountsSites),
    (law_frame.gradients, wrong.DecaysTheBase),
    (law_frame.gradients, wrong.TrainsAConstant),
    (laws.save_and_load, wrong.ReadsWhatItDoesNotSave),
    (laws.save_and_load, wrong.SharesAnotherEachTime),
    (laws.sizes, wrong.LooksAtTheBatch),
    (laws.onnx, wrong.IsNoisyInEval),
    (laws.identity, wrong.StartsWithAnOpenGate),
    (laws.merge, wrong.PromptsAtRandom),
    (laws.remove, wrong.ScalesTheKeys),
    (laws.idempotence, wrong.DrawsForItself),
    (laws.commute, wrong.CountsAttentions),
    (law_frame.gradients, wrong.DetachesThePrompt),
    (laws.save_and_load, wrong.KeepsItsPrompt),
    (laws.sizes, wrong.MixesRows),
    (laws.onnx, wrong.PromptsAtRandom),
    (law_prompts.saved, wrong.SaysAnotherShape),
    (law_prompts.saved, wrong.ScalesWhatIsSaved),
    (laws.merge, wrong.WordsAtRandom),
    (laws.remove, wrong.ScalesTheEmbedding),
    (laws.idempotence, wrong.DrawsItsOwnWords),
    (law_frame.gradients, wrong.DetachesItsWords),
)

RIGHT = ((wrong.Scale, CASE), (wrong.Glance, ATTENDING), (wrong.Words, PROMPTED))


@pytest.mark.parametrize(("law", "cls"), BROKEN, ids=[f"{law.__name__}-{cls.__name__}" for law, cls in BROKEN])
def test_the_law_catches_its_breaker_and_no_right_method(
    law: Callable[..., None], cls: type[WeightMethod | AttentionMethod | SequenceMethod]
) -> None:
    right, case = next((r, c) for r, c in RIGHT if issubclass(cls, r))
    target = {} if right is wrong.Words else {"target": ("blocks.1",) if law is law_frame.gradients else TARGET}
    with known(right):
        law(case, right(**target))
    with known(cls), pytest.raises(AssertionError):
        law(case, cls(**target))


def test_what_files_would_lose_is_refused_before_any_law() -> None:
    with pytest.raises(PeftfxError, match=r"SavesHalf\.keys leaves out m"):
        laws.idempotence(CASE, wrong.SavesHalf(target=TARGET))


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
