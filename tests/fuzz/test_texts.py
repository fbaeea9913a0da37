"""Targets, rules and HF PEFT's names for places: each text picks something, or is refused in one message."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fuzz.settle import cases, settle
from fuzz.twins import Base
from fuzz.values import BAD_PATTERNS, values, words
from hypothesis import given, settings
from hypothesis import strategies as st

import peftfx.target
from peftfx.methods import methods
from peftfx.model.plan import make_plan
from peftfx.rules.text import parse_rules

ATOMS = (
    *("attention.query", "attention", "mlp.down", "head", "all-linear", "q_proj", "layers.0.mlp", "norm", "nothing"),
    *("/.*proj/", "/(/", "/a{99999999999}/", "/(a|b)*c/", "//", "/", "~", "(", ")", "|", "&", "", " ", "é", "\n", "-."),
)
LONG = (
    "(" * 5000,
    "~" * 50001 + "mlp",
    "mlp" + "|mlp" * 20000,
    "(" * 90 + "mlp" + ")" * 90,
    "x" * 50000,
    "mlp&" * 20000,
)
targets = st.one_of(
    st.lists(st.sampled_from(ATOMS), max_size=8).map("".join),
    st.sampled_from(LONG),
    st.text(alphabet="amlp.|&~()/ \\[{*", max_size=12),
)
OPTIONS = (
    *(
        "r=1",
        "r=0",
        "r=-3",
        "r='8'",
        "r=True",
        "r=10**9",
        "r={[]:1}",
        "r=#",
        "r",
        "8",
        "**{}",
        "*[]",
        "r=(1)",
        "r=None",
    ),
    *("target='mlp'", "target=5", "target_modules=['q_proj']", "target_modules='('", "layers_to_transform=[0]"),
    *("layers_to_transform='a'", "lora_alpha=float('nan')", "lora_alpha=1e999", "rank_pattern={'(': 2}", "bias='all'"),
    *("rank_pattern={1: 2}", "num_virtual_tokens=3", "use_dora=1", "init_lora_weights='olora'", "modules_to_save=3"),
    *("modules_to_save=['norm']", "# '\nr=1)+f( # '\n", "r=" + "-" * 5000 + "1", "r=" + "[" * 150, "r=1" + "+1" * 9000),
    *("r='\\u0000'", "r=\u0000", "é=1", "lambda: 1", "token_indices=[1,2]", "token_indices=[-1]", "total_step='x'"),
)
names = st.sampled_from([*(name.lower() for name in methods()), "LoRA", "lorra", "", "5", "lora_", "é"])
rules = st.one_of(
    st.builds(
        lambda name, options, target: f"{name}({', '.join(options)}){target}",
        names,
        st.lists(st.sampled_from(OPTIONS), max_size=2),
        st.one_of(st.just(""), targets.map("@{}".format)),
    ),
    st.lists(st.sampled_from(["lora", "ia3", "lora(r=2)", ";", "@mlp", " ", "(", ")", "@", "'"]), max_size=6).map(
        "".join
    ),
    st.sampled_from(["lora;" * 300, "lora(" * 3000, "lora@" + "(" * 5000, "lora(r='" + "x" * 50000 + "')"]),
)
PLACES = ("target", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
patterns = st.sampled_from(BAD_PATTERNS)
places = st.one_of(
    st.dictionaries(st.sampled_from(PLACES), st.one_of(patterns, words, targets, values), max_size=2),
    st.fixed_dictionaries({"target_modules": st.just(["q_proj"]), "layers_pattern": st.one_of(patterns, values)}),
    st.fixed_dictionaries({"target_modules": st.just(["q_proj"]), "layers_to_transform": values}),
    st.fixed_dictionaries({"target": st.sampled_from([re.compile(".*"), [re.compile("x"), "mlp"], b"mlp", ()])}),
)


@cases(quick=40, many=2000)
def test_a_rule_acts_somewhere_or_is_refused(cases: settings, base: Base) -> None:
    @cases
    @given(rules)
    def check(text: str) -> None:
        plan_rules(text, base)

    check()


@cases(quick=30, many=1500)
def test_a_target_picks_sites_or_is_refused(cases: settings, base: Base) -> None:
    @cases
    @given(places)
    def check(where: Mapping[str, object]) -> None:
        pick(where, base)

    check()


def plan_rules(text: str, base: Base) -> None:
    """One case; what can be read is also planned."""
    found = settle(lambda: parse_rules(text))
    if not found.message:
        settle(lambda: make_plan(base.model, base.adapted.sites, text))


def pick(where: Mapping[str, object], base: Base) -> None:
    """One case: the same options to a target and to a rule."""
    settle(lambda: peftfx.target.explain(base.adapted.sites, **where))
    settle(lambda: peftfx.target.select(base.adapted.sites, **where))
    settle(lambda: make_plan(base.model, base.adapted.sites, peftfx.LoRA(**where)))
