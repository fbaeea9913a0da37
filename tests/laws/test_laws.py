"""The laws hold for every method there is, on random models: what `laws.py` and `law_frame.py` state."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from laws import frame as law_frame
from laws import slots as law_slots
from laws import statements as laws
from laws.cases import METHODS, WEIGHT_METHODS, Case, cases, examples
from laws.models import Spec
from laws.pool import POOL

from peftfx.contract.method import Method

every_method = pytest.mark.parametrize("cls", METHODS.values(), ids=METHODS)
UPDATING = {name: cls for name, cls in WEIGHT_METHODS.items() if name in ("LoRA", "IA3")}  # a product, and scales
FLOAT32 = tuple(spec for spec in POOL if spec.dtype == "float32")


@every_method
@examples(20)
@given(data=st.data())
def test_a_new_adapter_changes_no_output(cls: type[Method], data: st.DataObject) -> None:
    laws.identity(*data.draw(cases(cls)))


@pytest.mark.parametrize("cls", WEIGHT_METHODS.values(), ids=WEIGHT_METHODS)
@examples(60)
@given(data=st.data())
def test_forward_is_the_operation_on_folded_weights(cls: type[Method], data: st.DataObject) -> None:
    laws.fold(*data.draw(cases(cls)))


@pytest.mark.parametrize("cls", WEIGHT_METHODS.values(), ids=WEIGHT_METHODS)
@examples(30)
@given(data=st.data())
def test_an_update_is_the_fold_at_a_linear_site(cls: type[Method], data: st.DataObject) -> None:
    laws.update(*data.draw(cases(cls)))


@every_method
@examples(30)
@given(data=st.data())
def test_a_merged_graph_is_the_adapted_graph(cls: type[Method], data: st.DataObject) -> None:
    laws.merge(*data.draw(cases(cls)))


@every_method
@examples(12)
@given(data=st.data())
def test_a_base_merged_in_place_is_the_adapted_model(cls: type[Method], data: st.DataObject) -> None:
    laws.merge_in_place(*data.draw(cases(cls)))


@every_method
@examples(20)
@given(data=st.data())
def test_an_adapter_that_is_removed_leaves_no_trace(cls: type[Method], data: st.DataObject) -> None:
    laws.remove(*data.draw(cases(cls)))


@every_method
@examples(12)
@given(data=st.data())
def test_removing_one_of_two_adapters_leaves_the_other(cls: type[Method], data: st.DataObject) -> None:
    laws.remove_one(*data.draw(cases(cls)))


@every_method
@examples(15)
@given(data=st.data())
def test_doing_it_again_changes_nothing(cls: type[Method], data: st.DataObject) -> None:
    laws.idempotence(*data.draw(cases(cls)))


@every_method
@examples(12)
@given(data=st.data())
def test_rules_on_disjoint_places_commute(cls: type[Method], data: st.DataObject) -> None:
    laws.commute(*data.draw(cases(cls, least=2)))


@every_method
@examples(12)
@given(data=st.data())
def test_the_program_around_an_adapter_is_the_bases(cls: type[Method], data: st.DataObject) -> None:
    law_frame.frame(*data.draw(cases(cls)))


@every_method
@examples(15)
@given(data=st.data())
def test_training_moves_the_adapter_and_nothing_else(cls: type[Method], data: st.DataObject) -> None:
    law_frame.gradients(*data.draw(cases(cls)))


@every_method
@examples(25)
@given(data=st.data())
def test_an_adapter_that_is_saved_and_loaded_is_the_same(cls: type[Method], data: st.DataObject) -> None:
    laws.save_and_load(*data.draw(cases(cls)))


@every_method
@examples(15)
@given(data=st.data())
def test_rows_of_a_batch_of_any_size_are_independent(cls: type[Method], data: st.DataObject) -> None:
    laws.sizes(*data.draw(cases(cls)))


@every_method
@examples(15)
@given(data=st.data())
def test_the_bases_own_modules_are_the_graph(cls: type[Method], data: st.DataObject) -> None:
    laws.roads(*data.draw(cases(cls)))


@every_method
@examples(6)
@given(data=st.data())
def test_onnx_runtime_is_the_graph(cls: type[Method], data: st.DataObject) -> None:
    laws.onnx(*data.draw(cases(cls, FLOAT32)))


@pytest.mark.parametrize("cls", UPDATING.values(), ids=UPDATING)
@examples(8)
@given(data=st.data())
def test_a_slot_that_is_filled_is_the_adapter_inserted(cls: type[Method], data: st.DataObject) -> None:
    law_slots.slots(*data.draw(cases(cls, FLOAT32)))


@pytest.mark.parametrize("cls", UPDATING.values(), ids=UPDATING)
@examples(8)
@given(data=st.data())
def test_a_row_is_the_model_with_its_adapter_alone(cls: type[Method], data: st.DataObject) -> None:
    law_slots.rows(*data.draw(cases(cls, FLOAT32)))


@pytest.mark.parametrize("spec", FLOAT32, ids=[str(i) for i in range(len(FLOAT32))])
def test_a_layer_with_slots_is_the_layer_with_the_weight_that_they_make(spec: Spec) -> None:
    law_slots.slot_fold(Case(spec, batch=3, sequence=4))


@pytest.mark.parametrize("spec", POOL, ids=[str(i) for i in range(len(POOL))])
def test_sites_do_not_depend_on_names(spec: object) -> None:
    laws.roles(Case(spec))
