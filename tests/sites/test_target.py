"""Targets: which sites a rule picks, by role and by name, and what is said when it picks none."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from support.zoo import ZOO

import peftfx
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.sites.expression import Target
from peftfx.sites.site import Part, Site
from peftfx.sites.sites import Sites
from peftfx.sites.target import SelectedSite, explain, select


def site(path: str, role: str, kind: str = "linear", *parts: Part) -> Site:
    layer = next((int(word) for word in path.split(".") if word.isdigit()), None)
    return Site(path, kind, role, layer, f"base.{path}.weight", None, (8, 8), False, parts, ())


def block(index: int) -> list[Site]:
    parts = tuple(Part(f"attention.{name}", ((i, i + 1),)) for i, name in enumerate(("query", "key", "value")))
    halves = (Part("mlp.gate", ((0, 4),)), Part("mlp.up", ((4, 8),)))
    return [
        site(f"model.layers.{index}.attn.qkv", "attention.qkv", "linear", *parts),
        site(f"model.layers.{index}.attn", "attention", "attention"),
        site(f"model.layers.{index}.attn.o_proj", "attention.output"),
        site(f"model.layers.{index}.cross.q_proj", "attention.query"),
        site(f"model.layers.{index}.mlp.gate_up", "mlp.gate_up", "linear", *halves),
        site(f"model.layers.{index}.mlp.down", "mlp.down"),
    ]


SITES = Sites(
    (
        site("model.embed", "embedding.token", "embedding"),
        *block(0),
        *block(1),
        *block(11),
        site("model.conv", "conv", "conv"),
        site("lm_head", "head"),
    )
)


def picked(target: Target, sites: Sites = SITES) -> dict[str, tuple[str, ...]]:
    """Of the first layer: the end of the path -> the parts."""
    matches = select(sites, target=target)
    return {m.site.path.removeprefix("model.layers.0."): m.parts for m in matches if m.site.layer in (0, None)}


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("attention.query", {"attn.qkv": ("attention.query",), "cross.q_proj": ()}),
        ("attention.qkv", {"attn.qkv": ()}),
        ("attention.query | attention.key|attention.value", {"attn.qkv": (), "cross.q_proj": ()}),
        ("attention", {"attn.qkv": (), "attn.o_proj": (), "cross.q_proj": ()}),
        ("mlp.up", {"mlp.gate_up": ("mlp.up",)}),
        ("mlp", {"mlp.gate_up": (), "mlp.down": ()}),
        ("mlp & ~mlp.gate", {"mlp.gate_up": ("mlp.up",), "mlp.down": ()}),
        ("qkv & ~attention.query", {"attn.qkv": ("attention.key", "attention.value")}),
        ("o_proj", {"attn.o_proj": ()}),
        ("attn.o_proj | lm_head", {"attn.o_proj": (), "lm_head": ()}),
        ("/.*proj/ & attention.output", {"attn.o_proj": ()}),
        (re.compile(r".*\.down"), {"mlp.down": ()}),
        (["down", "embedding"], {"mlp.down": (), "model.embed": ()}),
        ("conv | head", {"model.conv": (), "lm_head": ()}),
        ("~(attention | mlp | embedding)", {"model.conv": (), "lm_head": ()}),
        ("embedding|mlp&down", {"model.embed": (), "mlp.down": ()}),
    ],
)
def test_expressions(target: Target, expected: dict[str, tuple[str, ...]]) -> None:
    assert picked(target) == expected


def test_all_linear_leaves_out_heads_embeddings_and_convolutions() -> None:
    assert {match.site.kind for match in select(SITES, target="all-linear")} == {"linear"}
    assert select(SITES, target="all-linear") == select(SITES, target_modules="all-linear") == select(SITES)
    assert "lm_head" not in {match.site.path for match in select(SITES)}


def test_attention_sites_are_picked_only_when_asked_for() -> None:
    matches = select(SITES, target="attention", kinds=("attention",))
    assert [match.site.path for match in matches] == [f"model.layers.{i}.attn" for i in (0, 1, 11)]


Names = list[str] | str
LAYERS = [(None, None), *itertools.product((1, [0, 11]), (None, "layers", ["blocks", "layers"], "blocks"))]
MODULES = [
    *itertools.product((["o_proj", "down"], ["attn.qkv"], ["model.layers.1.mlp.down"]), LAYERS),
    *itertools.product((r".*\.(0|11)\..*proj", "lm_head"), LAYERS[:1]),  # PEFT refuses layers with an expression
]


@pytest.mark.parametrize("exclude", [None, ["model.layers.1.attn.o_proj", "q_proj"], r".*\.0\..*"])
@pytest.mark.parametrize(("modules", "layers"), MODULES)
def test_module_names_mean_what_they_mean_in_peft(
    modules: Names, layers: tuple[int | list[int] | None, Names | None], exclude: Names | None
) -> None:
    transform, pattern = layers
    config = LoraConfig(
        target_modules=modules, exclude_modules=exclude, layers_to_transform=transform, layers_pattern=pattern
    )
    weights = [s for s in SITES if s.kind != "attention"]
    # An excluded module is a true value of a class of its own in PEFT.
    found = [(s.path, check_target_module_exists(config, s.path)) for s in weights]
    expected = [path for path, match in found if match and type(match).__name__ != "_ExcludedModule"]
    reasons = explain(
        SITES, target_modules=modules, exclude_modules=exclude, layers_to_transform=transform, layers_pattern=pattern
    )
    assert [reason.site.path for reason in reasons if reason.match] == expected


def test_layers_restrict_a_target() -> None:
    matches = select(SITES, target="attention.query", layers_to_transform=[0, 1], exclude_modules=["q_proj"])
    assert matches == [SelectedSite(SITES.by_path(f"model.layers.{i}.attn.qkv"), ("attention.query",)) for i in (0, 1)]


def test_explain_says_why() -> None:
    reasons = explain(SITES, target="attention.query", layers_to_transform=0, exclude_modules=["cross.q_proj"])
    assert {reason.site.path: reason.why for reason in reasons if reason.site.layer in (0, 1)} == {
        "model.layers.0.attn.qkv": "the target matches attention.query",
        "model.layers.0.attn": "its kind, attention, is not one of linear, conv, embedding",
        "model.layers.0.attn.o_proj": "the target does not match its path or role",
        "model.layers.0.cross.q_proj": "exclude_modules matches its path",
        "model.layers.0.mlp.gate_up": "the target does not match its path or role",
        "model.layers.0.mlp.down": "the target does not match its path or role",
        "model.layers.1.attn.qkv": "its layer is not in layers_to_transform",
        "model.layers.1.attn": "its kind, attention, is not one of linear, conv, embedding",
        "model.layers.1.attn.o_proj": "the target does not match its path or role",
        "model.layers.1.cross.q_proj": "exclude_modules matches its path",
        "model.layers.1.mlp.gate_up": "the target does not match its path or role",
        "model.layers.1.mlp.down": "the target does not match its path or role",
    }


@pytest.mark.parametrize(
    ("target", "column", "what"),
    [
        ("", 1, "expected a role"),
        ("mlp |", 6, "expected a role"),
        ("(mlp | head", 12, r"expected '\)'"),
        ("mlp head", 5, "expected '|'"),
        ("mlp & & head", 7, "expected a role"),
        ("mlp | /(/", 7, "bad regular expression"),
        ("mlp | $", 7, "expected a role"),
    ],
)
def test_a_syntax_error_points_at_its_place(target: str, column: int, what: str) -> None:
    with pytest.raises(PeftfxError, match=what) as caught:
        select(SITES, target=target)
    assert f"at column {column}:" in caught.value.hint
    assert caught.value.hint.splitlines()[-1] == " " * (4 + column - 1) + "^"


def test_no_match_names_the_nearest_and_what_there_is() -> None:
    with pytest.raises(PeftfxError, match="matches no site") as caught:
        select(SITES, target="attention.qurey")
    assert "did you mean 'attention.query'" in caught.value.hint
    assert "mlp.down (3)" in caught.value.hint
    with pytest.raises(PeftfxError, match="did you mean 'o_proj'"):
        select(SITES, target_modules=["o_prj"])
    with pytest.raises(PeftfxError, match="its layer is not in layers_to_transform"):
        select(SITES, target="mlp", layers_to_transform=99)


def test_contradictions_are_refused() -> None:
    with pytest.raises(PeftfxError, match="both given"):
        select(SITES, target="mlp", target_modules=["down"])
    with pytest.raises(PeftfxError, match="layers_to_transform needs a list"):
        select(SITES, target_modules=".*down", layers_to_transform=[0])
    with pytest.raises(PeftfxError, match="bad regular expression"):
        select(SITES, target_modules="(")


class TestWhatPicksNothing:
    """A word that picks nothing is told, with what is near it; sites of other kinds are named."""

    @pytest.mark.parametrize(
        ("where", "word"),
        [
            ({"target": "attention.qurey | attention.value"}, "attention.qurey"),
            ({"target": ["attention.value", "no_module & mlp"]}, "no_module"),
            ({"target_modules": ["q_pro", "v_proj"]}, "q_pro"),
        ],
    )
    def test_a_word_that_is_no_role_and_no_module_is_told(self, where: dict[str, Any], word: str) -> None:
        model = ZOO["llama"].build()
        with pytest.warns(PeftfxWarning, match=f"'{word}' is no role and no module that this model runs"):
            peftfx.transform(model, peftfx.LoRA(**where))

    @pytest.mark.parametrize(
        "target", ["attention.value | mlp.up", "v_proj | layers.0 & mlp", r"/.*v_proj/ | all-linear"]
    )
    def test_words_that_are_something_here_are_not(self, target: str, recwarn: pytest.WarningsRecorder) -> None:
        peftfx.transform(ZOO["llama"].build(), peftfx.LoRA(target=target))
        assert [str(w.message) for w in recwarn if w.category is PeftfxWarning] == []

    @pytest.mark.parametrize("target", ["norm", "self_attn", "input_layernorm"])
    def test_sites_of_another_kind_are_named(self, target: str) -> None:
        with pytest.raises(PeftfxError, match=r"picks only sites of kind (norm|attention)"):
            peftfx.transform(ZOO["llama"].build(), peftfx.LoRA(target=target))
