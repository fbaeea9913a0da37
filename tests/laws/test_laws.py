"""The laws hold for every method there is, on random models: what `peftfx.testing` states, run by its own code."""

from __future__ import annotations

import pytest
from _pytest.mark.structures import ParameterSet
from laws.choices import CHOICES, whole
from laws.renaming import roles

from peftfx.contract.method import Method
from peftfx.methods import methods
from peftfx.testing import slots
from peftfx.testing.cases import Case
from peftfx.testing.laws import LAWS, Law
from peftfx.testing.models import Spec
from peftfx.testing.pool import POOL

FLOAT32 = tuple(spec for spec in POOL if spec.dtype == "float32")
PAIRS = [(law, cls) for cls in methods().values() for law in LAWS if law.is_about(cls)]
#: Laws of passes, which know no method: a default run tries them with methods of each kind, CI with every method.
OF_PASSES = ("remove_one", "idempotence", "commute")
KINDS = ("LORA", "IA3", "VERA", "BOFT", "LN_TUNING", "TRAINABLE_TOKENS", "ADAPTION_PROMPT", "PREFIX_TUNING", "PEANUT")


def _marked(law: Law, cls: type[Method]) -> ParameterSet:
    further = law.name in OF_PASSES and cls.peft_type not in KINDS
    marks = [pytest.mark.further] if further else []
    return pytest.param(law, cls, marks=marks, id=f"{law.name}-{cls.peft_type}")


@pytest.mark.parametrize(("law", "cls"), [_marked(*pair) for pair in PAIRS])
def test_a_law_holds_for_a_method(law: Law, cls: type[Method]) -> None:
    law.hold(cls, CHOICES.get(cls.peft_type), whole=whole(), quick=1)


@pytest.mark.slow
@pytest.mark.parametrize(("law", "cls"), PAIRS, ids=[f"{law.name}-{cls.peft_type}" for law, cls in PAIRS])
def test_a_law_holds_for_a_method_on_a_random_model(law: Law, cls: type[Method]) -> None:
    law.hold(cls, CHOICES.get(cls.peft_type))


@pytest.mark.parametrize("spec", FLOAT32, ids=[str(i) for i in range(len(FLOAT32))])
def test_a_layer_with_slots_is_the_layer_with_the_weight_that_they_make(spec: Spec) -> None:
    slots.slot_fold(Case(spec, batch=3, sequence=4))


@pytest.mark.parametrize("spec", POOL, ids=[str(i) for i in range(len(POOL))])
def test_sites_do_not_depend_on_names(spec: object) -> None:
    roles(Case(spec))
