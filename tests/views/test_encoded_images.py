"""The features that an image encoder gives are joined for a graph, and put back where the model's code reads them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.modeling_outputs import BaseModelOutputWithPooling

from peftfx.bases.processors.encoded_images import FoundFeatures, joined_features
from peftfx.views.images.encoded import Images

PIECES, WIDTH = 4, 3


def _output(**fields: object) -> BaseModelOutputWithPooling:
    output = BaseModelOutputWithPooling(hidden_states=(torch.zeros(1, 9, 5),))
    for name, value in fields.items():
        setattr(output, name, value)
    return output


def _one(seed: int, *first: int) -> Tensor:
    return torch.randn(*first, PIECES, WIDTH, generator=torch.Generator().manual_seed(seed))


OUTPUTS = {
    "a tensor": _output(pooler_output=_one(0, 1)),
    "a list with a tensor for each image": _output(pooler_output=[_one(0)]),
    "no pooled features": _output(last_hidden_state=_one(0, 1)),
    "features for deeper layers too": _output(pooler_output=[_one(0)], deep=[[_one(1)], [_one(2)]]),
    "features for layers alone": _output(deep=[(2, [_one(0)]), (0, [_one(1)])]),
}


@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_features_return_to_their_fields(output: BaseModelOutputWithPooling) -> None:
    found = FoundFeatures.of(output)
    joined = joined_features(output, found.deeper)
    assert joined.shape == (PIECES, found.width)

    each = None if found.listed else PIECES
    images = Images(0, found.width, joined.dtype, each, found.listed, (), deeper=found.deeper, field=found.field)
    again = images.as_output(joined)
    for name in ("pooler_output", "last_hidden_state", "deep"):
        before, after = (pytree.tree_flatten(getattr(found, name, None)) for found in (output, again))
        assert before[1] == after[1], name
        for want, got in zip(before[0], after[0], strict=True):
            assert torch.equal(want, got) if isinstance(want, Tensor) else want == got


def test_states_and_fields_of_another_shape_are_no_features() -> None:
    output = _output(pooler_output=_one(0, 1), sizes=[torch.zeros(2)], attentions_of_a_part=(None, None))
    assert FoundFeatures.of(output).deeper == ()
