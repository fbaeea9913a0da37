"""Regular expressions from files and rule texts: what Python's `re` says, without its exponential times."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftfx.errors import PeftfxError
from peftfx.methods.ia3 import IA3
from peftfx.methods.lora import LoRA
from peftfx.sites.patterns import _AllWays, compiled, quick
from peftfx.sites.site import Site
from peftfx.sites.target import select

PATHS = [f"model.layers.{i}.{'a' * 40}.{name}" for i in range(30) for name in ("q_proj", "v_proj", "down_proj")]
SITES = [Site(path, "linear", "mlp.up", 0, "", None, (4, 4), False, (), ()) for path in PATHS]
EVIL = [
    r"model\.layers\.\d+\.(a+)+",
    r"(.*a)*",
    r"(.|\w)*=",
    r"(\w+\.?)+=",
    r".*.*.*.*.*.*.*.*=",
    r"((.?){40}){40}=",
    r"(?=(.+)+=).*",
    r"(?<!=)(.*,)*(.*,)*(.*,)*=",
]
USUAL = [
    r".*\.(q|v)_proj",
    r".*layers.*(self_attn|mlp|a+).*(q|k|v|o|up|down|gate)_proj$",
    r"^(?!.*vision)(?=.*(?:q_proj|v_proj)).*$",
    r"model\.layers\.(?:[0-9]|1[0-9])\.a+\.down_proj",
]


@pytest.mark.parametrize("pattern", EVIL)
def test_one_that_would_run_for_years_ends_in_a_second(pattern: str) -> None:
    start = time.process_time()
    for asked in ({"target_modules": pattern}, {"target": f"/{pattern}/"}):
        with pytest.raises(PeftfxError, match="the target matches no site"):
            select(SITES, **asked)  # type: ignore[arg-type]
    assert len(select(SITES, exclude_modules=pattern)) == len(SITES)
    methods = (LoRA(rank_pattern={pattern: 2}), IA3(feedforward_modules=pattern))
    assert [method.at(site).r for method in methods[:1] for site in SITES] == [8] * len(SITES)
    assert not any(methods[1]._is_feedforward(site) for site in SITES)
    with pytest.raises(PeftfxError, match="layers_pattern"):
        select(SITES, target_modules=["q_proj"], layers_to_transform=[0], layers_pattern=pattern)
    assert time.process_time() - start < 5, "four options, each within about a second"


@pytest.mark.parametrize("pattern", USUAL)
def test_a_usual_one_picks_what_it_does_in_python(pattern: str) -> None:
    want = [path for path in PATHS if re.fullmatch(pattern, path)]
    assert want
    assert [match.site.path for match in select(SITES, target_modules=pattern)] == want
    assert [match.site.path for match in select(SITES, target=f"/{pattern}/")] == want


def test_what_cannot_be_followed_in_all_ways_is_refused() -> None:
    with pytest.raises(PeftfxError, match=r"target_modules: \(a\+\)\+\\1"):
        compiled(r"(a+)+\1b", "target_modules").fullmatch("aaab")
    assert compiled(r"(a+)\1b", "target_modules").fullmatch("aab")
    with pytest.raises(PeftfxError, match="bad regular expression"):
        compiled("(", "target_modules")
    assert quick("layers|h", "layers_pattern").fullmatch("h")


ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\w", r"\d", r"\.", "^", "$", r"\b", "(?i:A)", "x"])


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    counts = st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?", "+?", "{0,2}?"])
    looks = st.sampled_from(["(?=", "(?!", "(", "(?:", "(?<=", "(?<!"])
    return st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("(?:{}){}".format, inner, counts),
        st.builds("{}{})".format, looks, inner),
    )


@settings(max_examples=300, deadline=None)
@given(st.recursive(ATOMS, _larger, max_leaves=8), st.lists(st.text("abAx1.", max_size=8), max_size=6))
def test_all_ways_at_once_match_what_python_does(pattern: str, texts: list[str]) -> None:
    try:
        want = re.compile(pattern)
    except re.error:  # what is behind may have no one length
        return
    ours = _AllWays(re._parser.parse(pattern), want.flags, (pattern, ""))  # type: ignore[attr-defined]
    for text in texts:
        assert ours.fullmatch(text) == bool(want.fullmatch(text)), text
