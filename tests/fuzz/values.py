"""Values that files and users have by mistake, and what is done to a file to spoil it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

Json = object


def nested(depth: int) -> str:
    """JSON text of lists inside one another."""
    return "[" * depth + "]" * depth


def deep(depth: int) -> Json:
    """Lists inside one another."""
    value: Json = 1
    for _ in range(depth):
        value = [value]
    return value


BAD_PATTERNS = ("(", "[", "*", "a{99999999999}", "(?P<layer>x)", "a|", "\\", "(?<=a*)b", "[[", "(" * 300)
WORDS = (
    *("", " ", ".", "q_proj", "v_proj", "model.layers.0.self_attn.q_proj", "all-linear", "lm_head", "embed_tokens"),
    *(
        "none",
        "all",
        "lora_only",
        "no",
        "true",
        "LORA",
        "CAUSAL_LM",
        "pissa",
        "é\u0000\ud7ff",
        "x" * 3000,
        *BAD_PATTERNS,
    ),
)
INTEGERS = (-1, 0, 1, 2, 3, 7, 64, -(10**18), 10**18, 10**30)
FLOATS = (0.5, -0.5, 1.0, 1e-9, 1e300, float("inf"), float("nan"))

words = st.sampled_from(WORDS)
scalars = st.one_of(
    st.none(), st.booleans(), st.sampled_from(INTEGERS), st.sampled_from(FLOATS), words, st.text(max_size=8)
)
values: st.SearchStrategy[Json] = st.one_of(
    scalars,
    st.lists(scalars, max_size=3),
    st.dictionaries(words, scalars, max_size=2),
    st.dictionaries(words, st.lists(scalars, max_size=2), max_size=1),
    st.sampled_from([deep(3), deep(90), deep(110), [[]], {"": {}}, [None] * 40]),
)
raw_texts = st.one_of(
    st.sampled_from(["", "{", "[]", "null", "5", '"a"', "{}", nested(50), nested(2000), nested(200000), "\ufeff{}"]),
    st.text(max_size=20),
)


@dataclass(frozen=True)
class Change:
    """A field of a JSON object given another value, or taken out."""

    field: str
    value: Json = None
    out: bool = False


def changes(fields: Sequence[str], given: st.SearchStrategy[Json] = values) -> st.SearchStrategy[list[Change]]:
    """Up to three changes of an object that has these fields."""
    names = st.sampled_from(fields)
    change = st.one_of(
        st.builds(Change, names, given),
        st.builds(Change, names, given),
        st.builds(Change, names, out=st.just(True)),
        st.builds(Change, words, given),
    )
    return st.one_of(st.lists(change, min_size=1, max_size=1), st.lists(change, min_size=1, max_size=3))


def changed(twin: Mapping[str, Json], spoils: Sequence[Change]) -> dict[str, Json]:
    """The object after changes."""
    made = dict(twin)
    for change in spoils:
        if change.out:
            made.pop(change.field, None)
        else:
            made[change.field] = change.value
    return made


def write_json(path: Path, value: Json) -> None:
    """As it stands, with what JSON does not have: infinity, and half of a character pair."""
    path.write_text(json.dumps(value), encoding="utf-8", errors="surrogatepass")
