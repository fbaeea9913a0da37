"""Inputs of a call at sizes that no capture saw, made from a model's config or from the example's own inputs."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import optimization_hint

from peftfx.bases.config_fields import first_of, special_tokens
from peftfx.bases.embeddings import input_embeddings
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.image_tokens import most_in_a_text
from peftfx.errors import PeftfxError
from peftfx.graph.conditions import Condition, completed
from peftfx.graph.graph import Graph, TensorSpec
from peftfx.model.adapted import AdaptedModel
from peftfx.views.arguments import named_tensors
from peftfx.views.forward_axes import WRITTEN
from peftfx.views.view import LONG_TEXT

PROBE_SIZES: Sequence[Mapping[str, int]] = (
    {"batch": 1, "sequence": 9, "decoder_sequence": 4},
    {"batch": 3, "sequence": 5, "decoder_sequence": 8},
    {"batch": 2, "sequence": LONG_TEXT, "decoder_sequence": LONG_TEXT},
    {"batch": 5, "sequence": 8, "decoder_sequence": 3},
    {"batch": 4, "sequence": 12, "decoder_sequence": 6},
)
ONE: Mapping[str, int] = dict.fromkeys(PROBE_SIZES[0], 1)
COUNT = 3  #: how many sizes are compared; the others replace sizes that the model itself refuses
FEW: Sequence[Mapping[str, int]] = (
    {"batch": 1, "sequence": 5, "decoder_sequence": 3},
    {"batch": 3, "sequence": 3, "decoder_sequence": 4},
)  #: for a model that takes about a second for each token
_TEXTS = ("input_ids", "decoder_input_ids")
_EVERY = 3  #: of so many tokens of a text one is a trained one
_LARGE = 1 << 30  #: bytes of weights from which a model is large
_HEAVY = 1 << 25  #: numbers of a tensor inside a call from which the call is heavy
_ROWS = 2  #: the most rows of a heavy call
_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def is_large(base: nn.Module) -> bool:
    """Return whether a model is so large that its export is compared in fewer calls."""
    return sum(p.numel() * p.element_size() for p in base.parameters()) > _LARGE


def is_heavy(graph: Graph) -> bool:
    """Return whether a call of the example's sizes makes so large a tensor that it is compared in few and small calls.

    Examples are attention over all pieces of a picture of 1024 x 1024 pixels, of a video, or of a sound, whose scores
    no node of the graph shows. In float64 such a tensor has twice the bytes, and several are in memory at once.
    """
    nodes = [node for node in graph.module.graph.nodes if node.op != "get_attr"]
    shapes = [tuple(value.shape) for node in nodes if isinstance(value := node.meta.get("val"), Tensor)]
    shapes += [_scores(node) for node in nodes if node.target is _ATTENTION]
    return any(math.prod(optimization_hint(size, fallback=1) for size in shape) > _HEAVY for shape in shapes)


def _scores(attention: fx.Node) -> tuple[int, ...]:
    """Return the shape of the scores of a fused attention: one for each query and each key."""
    query, key = (x.meta["val"] for x in attention.args[:2])  # type: ignore[union-attr]
    return (*query.shape[:-1], key.shape[-2])


def with_few_rows(tried: Sequence[Mapping[str, int]], axes: Collection[str]) -> list[Mapping[str, int]]:
    """Return sizes of these axes, with as many rows as a heavy call may have. Each is returned once."""
    few = [{a: min(n, _ROWS) if a == "batch" else n for a, n in sizes.items() if a in axes} for sizes in tried]
    return [sizes for i, sizes in enumerate(few) if sizes not in few[:i]]


def case_of(
    adapted: AdaptedModel,
    specs: Sequence[TensorSpec],
    example: Mapping[str, object],
    sizes: Mapping[str, int],
    seed: int,
) -> dict[str, Tensor]:
    """Make inputs of these sizes. If the config does not suffice, the example's own inputs are repeated and cut."""
    names = [spec.name for spec in specs]
    sizes = _with_pieces(adapted.base, sizes)
    try:
        made = _made(adapted.base, sizes, seed + 1)
    except PeftfxError:
        made = {}
    if set(made) == set(names):
        case = {spec.name: made[spec.name].to(spec.dtype) for spec in specs}
        if all(spec.accepts(case[spec.name]) and _sized(spec, case[spec.name], sizes) for spec in specs):
            return case
    given = named_tensors(example)
    rng = torch.Generator().manual_seed(seed)
    picked: dict[str, Tensor] = {}
    return {spec.name: _resized(given[spec.name], spec.shape, sizes, rng, picked) for spec in specs}


def _made(base: nn.Module, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    text = {name: size for name, size in sizes.items() if name in PROBE_SIZES[0] or name in WRITTEN}
    if "sequence" in text:
        text["sequence"] -= _pieces(base) * _images_in_text(text)
    return example_inputs(base, sizes=text, seed=seed)


def _with_pieces(base: nn.Module, sizes: Mapping[str, int]) -> Mapping[str, int]:
    """Return the sizes, with room in the text for all tokens that stand for pieces of images or sounds."""
    least = _pieces(base) * _images_in_text(sizes) + 1
    return {name: max(size, least) if name == "sequence" else size for name, size in sizes.items()}


def _images_in_text(sizes: Mapping[str, int]) -> int:
    """Return how many images or sounds the text with most of them has, as `example_inputs` deals them out."""
    batch = sizes.get("batch", 1)
    return most_in_a_text(next((sizes[axis] for axis in WRITTEN if axis in sizes), batch), batch)


def _pieces(base: nn.Module) -> int:
    """Return how many tokens of an example's text stand for pieces of its image or sound."""
    try:
        made = example_inputs(base, sizes={"batch": 1, "sequence": 1})
    except PeftfxError:
        return 0
    return made["input_ids"].shape[1] - 1 if "input_ids" in made else 0


def _sized(spec: TensorSpec, value: Tensor, sizes: Mapping[str, int]) -> bool:
    return all(sizes.get(str(axis), size) == size for axis, size in zip(spec.shape, value.shape, strict=True))


def sizes_beside(own: Mapping[str, int]) -> Iterator[dict[str, int]]:
    """Yield sizes beside the example's, for a model that takes none of the usual ones, such as one of recordings."""
    yield {**own, "batch": 1}
    yield {axis: size + 3 for axis, size in own.items()}
    yield {axis: 2 * size + 1 for axis, size in own.items()}


def sizes_of_one(own: Mapping[str, int], relations: Sequence[Condition]) -> Iterator[dict[str, int]]:
    """Yield a size of 1 for all axes, if axes without usual sizes are among them."""
    if own.keys() - completed(relations, ONE).keys():
        yield dict.fromkeys(own, 1)


def varied_sizes(own: Mapping[str, int], relations: Sequence[Condition]) -> Iterator[dict[str, int]]:
    """Yield sizes for axes without usual sizes: one and two more than the example's, or what follows from others.

    They are not the batch's: where images are counted apart from texts, there are more of them, and then fewer.
    """
    free = [axis for axis in own if axis not in completed(relations, PROBE_SIZES[0])]
    for i, beside in ((1, 1), (2, -1)) if free else ():
        sizes = dict(PROBE_SIZES[i])
        for axis in free:
            size = own[axis] + i
            sizes = completed(relations, {axis: size + beside if size == sizes["batch"] else size, **sizes})
        yield sizes


def _resized(
    value: Tensor,
    axes: Sequence[int | str],
    sizes: Mapping[str, int],
    rng: torch.Generator,
    picked: dict[str, Tensor],
) -> Tensor:
    """Pick places of the example along each axis, in order, and the same in all inputs, so that a token sees itself.

    If each row of a boolean mask has a True, so has each row of the result, and the same for False, for masks that say
    what is hidden: attention to nothing has no value.
    """
    masks = value.dtype == torch.bool and value.ndim > 1
    shows, hides = masks and bool(value.any(-1).all()), masks and not bool(value.all(-1).any())
    for dim, axis in enumerate(axes):
        if isinstance(axis, str) and axis in sizes:
            if axis not in picked:
                picked[axis] = torch.randint(value.shape[dim], (sizes[axis],), generator=rng).sort().values
            value = value.index_select(dim, picked[axis])
    if value.is_floating_point():
        return value + 0.1 * torch.randn(value.shape, generator=rng, dtype=torch.float32).to(value.dtype)
    if hides:
        value = value & ~value.all(-1, keepdim=True)
    return value | ~value.any(-1, keepdim=True) if shows else value


def with_trained_tokens(
    inputs: Mapping[str, Tensor], adapted: AdaptedModel, seed: int = 0, *, ends: bool = False
) -> dict[str, Tensor]:
    """Return inputs with trained tokens (`trainable_token_indices`) at some places of the text, in turn.

    A few random texts have a small part of a vocabulary: else no call would read what was trained. Special tokens in
    a text stay where they are.

    Args:
        inputs: the inputs of a call.
        adapted: the model, whose adapters train the tokens, active or not.
        seed: where the trained tokens begin.
        ends: whether a trained token may be the one that begins or ends texts; the forwards of some models count it.
    """
    made, known = dict(inputs), _trained(adapted)
    if not known:
        return made
    special = set(special_tokens(getattr(adapted.base, "config", None)))
    barred = special - (_ends(adapted) if ends else set())
    trained = torch.tensor(sorted(known - barred), dtype=torch.int64)
    for name in _TEXTS if len(trained) else ():
        ids = made.get(name)
        if ids is not None and ids.ndim >= 2 and not ids.is_floating_point():
            places = torch.arange(seed, seed + ids.numel()).reshape(ids.shape)
            taken = places % _EVERY == 0
            for token in special:
                taken &= ids != token
            made[name] = torch.where(taken, trained[places // _EVERY % len(trained)], ids)
    return made


def _trained(adapted: AdaptedModel) -> set[int]:
    """Return the tokens of which adapters have rows of their own."""
    weight = getattr(input_embeddings(adapted.base), "weight", None)
    rows = 0 if weight is None else weight.shape[0]
    known = {row for name in adapted.names() for own in adapted.adapter(name).overrides for row in own.rows}
    return {row for row in known if row < rows}


def _ends(adapted: AdaptedModel) -> set[int]:
    found = (first_of(getattr(adapted.base, "config", None), name) for name in ("bos_token_id", "eos_token_id"))
    return {token for value in found for token in (value if isinstance(value, list | tuple) else (value,))}
