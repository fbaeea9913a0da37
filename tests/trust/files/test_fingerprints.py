"""A base's fingerprint sees every value of every weight, and nothing else."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from peftfx.errors import PeftfxError
from peftfx.graph.fingerprint import fingerprint
from peftfx.graph.lazy_weights import store


class Base(nn.Module):
    """Weights of several kinds; two are tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(300, 16)
        self.head = nn.Linear(16, 300, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(16)
        self.register_buffer("steps", torch.tensor(2**40 + 1))
        self.register_buffer("turns", torch.randn(3, 2, dtype=torch.complex64))
        self.register_buffer("none", torch.empty(0, 4))
        self.register_buffer("mask", torch.tensor([True, False]))


@pytest.fixture
def base() -> Base:
    torch.manual_seed(0)
    return Base()


def test_it_changes_with_any_value(base: Base) -> None:
    known = {fingerprint(base)}
    for index in (0, 1, 2, 2047, 4798, 4799):
        other = copy.deepcopy(base)
        with torch.no_grad():
            other.embed.weight.view(-1)[index] *= 1 + 1e-6
        known.add(fingerprint(other))
    for name in ("steps", "turns", "mask"):
        other = copy.deepcopy(base)
        value = getattr(other, name).view(-1)
        value[-1] = ~value[-1] if value.dtype == torch.bool else value[-1] + 1
        known.add(fingerprint(other))
    assert len(known) == 10


def test_swapped_values_names_and_shapes_count(base: Base) -> None:
    other = copy.deepcopy(base)
    other.embed.weight = nn.Parameter(base.embed.weight.detach().flip(0))
    shaped = copy.deepcopy(base)
    shaped.turns = base.turns.reshape(2, 3)
    named = copy.deepcopy(base)
    named.other = named._modules.pop("norm")
    assert len({fingerprint(m) for m in (base, other, shaped, named)}) == 4


def test_a_base_in_half_precision_is_the_same_as_it_is_stored_and_as_it_is_shown(base: Base) -> None:
    half = copy.deepcopy(base).to(torch.bfloat16)
    whole = copy.deepcopy(half).to(torch.float32)
    shown = copy.deepcopy(half)
    store(shown, lambda _: torch.float32)
    assert fingerprint(half) == fingerprint(whole) == fingerprint(shown) != fingerprint(base)


def test_a_large_weight_is_read_in_parts(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fingerprint(base)
    monkeypatch.setattr("peftfx.graph.fingerprint._CHUNK", 1000)
    assert fingerprint(base) == whole


def test_an_older_one_sees_some_values_and_a_newer_one_is_refused(base: Base) -> None:
    other = copy.deepcopy(base)
    with torch.no_grad():
        other.embed.weight.view(-1)[1] += 1
    assert fingerprint(base, 1) == fingerprint(other, 1) != fingerprint(base)
    with pytest.raises(PeftfxError, match="of a later version, 3"):
        fingerprint(base, 3)
