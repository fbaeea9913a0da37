"""Captures and exports: a rule and options of any kind give what `peft` gives, or are refused and leave nothing."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from fuzz.settle import cases, settle
from fuzz.twins import Base
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapted import randomise

from peftfx.export import OnnxModel

SECONDS = 60.0  #: that an export of the unspoiled twin takes on a machine that is slow, and `LIMIT` more
TARGETS = ("attention.query", "mlp", "attention.query | attention.value", "all-linear", "head", "q_proj", "/.*down.*/")
OPTIONS = (
    *("r=1", "r=3", "use_dora=True", "use_rslora=True", "lora_alpha=3", "bias='all'", "init_lora_weights='pissa'"),
    *(
        "init_lora_weights='gaussian'",
        "rank_pattern={'q_proj': 2}",
        "layers_to_transform=[1]",
        "modules_to_save=['norm']",
    ),
    *("modules_to_save=['lm_head']", "trainable_token_indices=[5, 9]", "lora_bias=True", "lora_dropout=0.5"),
)
LORA = st.builds(
    lambda options, target: f"lora({', '.join(options)})@{target}",
    st.lists(st.sampled_from(OPTIONS), max_size=2, unique_by=lambda option: option.partition("=")[0]),
    st.sampled_from(TARGETS),
)
OTHERS = ("ia3", "vera(r=3)", "adalora(init_r=3)", "ln_tuning", "bitfit", "trainable_tokens(token_indices=[5])")
PROMPTS = (
    "prompt_tuning(num_virtual_tokens=2)",
    "prefix_tuning(num_virtual_tokens=2)",
    "p_tuning(num_virtual_tokens=2)",
)
rules = st.one_of(LORA, LORA, st.sampled_from([*OTHERS, *PROMPTS, "ia3@mlp; lora@attention.query", "adaption_prompt"]))


@dataclass(frozen=True)
class Export:
    """A rule, and how it is exported."""

    rule: str
    merge: bool = True
    view: str = "forward"
    opset: int | None = None
    optimize: str = "cpu"


exports = st.builds(
    Export,
    rules,
    st.booleans(),
    st.sampled_from(["forward", "forward", "decode", "auto", "backward"]),
    st.sampled_from([None, None, None, 18, 23, 3]),
    st.sampled_from(["cpu", "cpu", "none", "tpu"]),
)


@cases(quick=1, many=300)
def test_an_export_does_what_peft_does_or_leaves_nothing(cases: settings, base: Base, tmp_path: Path) -> None:
    @cases
    @given(exports)
    def check(export: Export) -> None:
        run(export, base, tmp_path)

    check()


def run(export: Export, base: Base, directory: Path) -> None:
    """One case."""
    base.adapted.remove()  # what a command line that was typed before left on it
    shutil.rmtree(directory / "out", ignore_errors=True)
    shutil.rmtree(directory / "adapter", ignore_errors=True)
    try:
        if settle(lambda: base.adapted.add_adapter("fuzzed", export.rule, seed=0), SECONDS).message:
            assert base.adapted.names() == ()
            return
        randomise(base.adapted)
        options = {"merge": export.merge, "view": export.view, "opset": export.opset, "optimize": export.optimize}
        done = settle(lambda: base.adapted.export(directory / "out", **options), SECONDS)
        if done.message:
            assert list(directory.iterdir()) == []
            return
        with torch.no_grad():
            ours = base.adapted(**base.call()).logits
        if not settle(lambda: base.adapted.save_pretrained(directory / "adapter")).message:
            theirs = base.theirs(directory / "adapter")
            assert theirs is None or near(ours, theirs), export
        if export.view == "forward":
            assert near(OnnxModel(directory / "out")(**base.call())["logits"], ours), export
    finally:
        base.adapted.remove()


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    """Equal but for rounding, relative to the largest value."""
    return got.shape == want.shape and float((got - want).abs().max()) <= 1e-4 * max(1.0, float(want.abs().max()))
