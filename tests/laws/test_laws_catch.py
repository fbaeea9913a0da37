"""Every law catches the wrong method made for it, and holds for the right method that it was made from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from laws import breakers as wrong
from laws import breakers_of_files as wrong_files
from laws.renaming import roles

from peftfx import LoRA
from peftfx.contract.attention import AttentionMethod
from peftfx.contract.sequence import SequenceMethod
from peftfx.contract.weight import WeightMethod
from peftfx.errors import PeftfxError
from peftfx.graph.rewriter import REGION
from peftfx.passes import Insert, PassResult, Remove
from peftfx.testing import arithmetic
from peftfx.testing import frame as law_frame
from peftfx.testing import prompts as law_prompts
from peftfx.testing import slots as law_slots
from peftfx.testing import statements as laws
from peftfx.testing.blocks import AttentionBlock, DenseBlock
from peftfx.testing.cases import Case
from peftfx.testing.check import known
from peftfx.testing.models import Causal, Text

CASE = Case(Text((DenseBlock(), DenseBlock())), batch=3, sequence=4)
TARGET = ("blocks.0", "blocks.1")

#: The gradients' breakers need a second place that is not adapted; an attention that is written out has no modules.
_TARGETS: dict[Callable[..., None], tuple[str, ...]] = {law_frame.gradients: ("blocks.1",), laws.roads: ("blocks.0",)}
ATTENDING = Case(Text((AttentionBlock(), AttentionBlock("softmax", "heads"))), batch=3, sequence=4)
PROMPTED = Case(Causal(()), batch=3, sequence=4)

BROKEN: tuple[tuple[Callable[..., None], type[WeightMethod | AttentionMethod | SequenceMethod]], ...] = (
    (laws.neutral, wrong.StartsAtRandom),
    (arithmetic.fold, wrong.ForgetsTheBias),
    (arithmetic.by_row, wrong.FoldsByTheLargestRow),
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
    (laws.roads, wrong.LooksAtTheTrace),
    (laws.neutral, wrong.StartsWithAnOpenGate),
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
    (laws.roads, wrong.ReadsAnotherPromptInAGraph),
    (laws.save_and_load, wrong_files.SharesByItsTarget),
    (laws.save_and_load, wrong_files.ReadsWhatItWrote),
    (law_prompts.saved, wrong_files.SplitsTheOtherWay),
)

RIGHT = (
    *((wrong_files.SharesGains, CASE), (wrong_files.SavesRoots, CASE), (wrong_files.Halves, PROMPTED)),
    *((wrong.Scale, CASE), (wrong.Glance, ATTENDING), (wrong.Words, PROMPTED)),
)


@pytest.mark.parametrize(("law", "cls"), BROKEN, ids=[f"{law.__name__}-{cls.__name__}" for law, cls in BROKEN])
def test_the_law_catches_its_breaker_and_no_right_method(
    law: Callable[..., None], cls: type[WeightMethod | AttentionMethod | SequenceMethod]
) -> None:
    right, case = next((r, c) for r, c in RIGHT if issubclass(cls, r))
    of, wrongly = (
        ({}, {}) if issubclass(right, wrong.Words) else ({"target": TARGET}, {"target": _TARGETS.get(law, TARGET)})
    )
    with known(right):
        law(case, right(**of))
    with known(cls), pytest.raises(AssertionError):
        law(case, cls(**wrongly))


def test_what_files_would_lose_is_refused_before_any_law() -> None:
    with pytest.raises(PeftfxError, match=r"SavesHalf\.keys leaves out m"):
        laws.idempotence(CASE, wrong.SavesHalf(target=TARGET))


def test_sites_found_by_name_are_caught() -> None:
    case = Case(Text((AttentionBlock("softmax"),)))
    roles(case)
    with pytest.raises(AssertionError):
        roles(case, wrong.sites_by_name)


@pytest.mark.parametrize(
    ("law", "where", "breaker"),
    [
        (law_slots.slots, "peftfx.passes.slots.open.acted", wrong.forgets_the_low_rank_sum),
        (law_slots.rows, "peftfx.passes.slots.layer_by_row.acted", wrong.adds_the_bias_twice),
        (law_slots.rows, "peftfx.passes.slots.by_row._Rows._index", wrong.takes_the_next_entry),
    ],
    ids=["a slot without its sum", "a row with its bias twice", "a row that takes the next one's"],
)
def test_a_slot_or_a_row_that_computes_something_else_is_caught(
    law: Callable[..., None], where: str, breaker: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = LoRA(r=2, target=TARGET)
    law(CASE, method)
    monkeypatch.setattr(where, breaker)
    with pytest.raises(AssertionError):
        law(CASE, method)


def test_slots_that_make_another_weight_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    law_slots.slot_fold(CASE)
    monkeypatch.setattr("peftfx.passes.slots.open.acted", wrong.adds_the_bias_twice)
    with pytest.raises(AssertionError):
        law_slots.slot_fold(CASE)


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
    monkeypatch.setattr("peftfx.model.graphs.graph_cache.Insert", Careless)
    with pytest.raises(AssertionError):
        law_frame.frame(CASE, method)


def test_a_removal_that_leaves_something_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    laws.remove_one(CASE, wrong.Scale(target=TARGET))
    monkeypatch.setattr(Remove, "_mine", lambda self, adapter: True)
    with pytest.raises(AssertionError):
        laws.remove_one(CASE, wrong.Scale(target=TARGET))
