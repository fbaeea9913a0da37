"""What `peftfx run` is asked for is checked ahead of all work: what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as hf
from serving.test_runtime import exported
from support.command import Result

from peftfx import PeftfxError
from peftfx.serving.runs.asked import Asked


@pytest.mark.parametrize(
    ("given", "what", "hint"),
    [
        ({"top": 0}, "--top must be 1 or more, not 0", "1 or more"),
        ({"max_new_tokens": 0}, "--max-new-tokens must be 1 or more, not 0", "1 or more"),
        ({"temperature": -0.5}, "--temperature must be 0 or more, not -0.5", "0 or more"),
        ({"temperature": float("nan")}, "--temperature must be 0 or more, not nan", "0 or more"),
        ({"save": Path("rows.txt")}, "--save writes a .npy file", "rows.npy"),
        ({"output": Path("segments.jpg")}, "--output writes a .png file", "segments.png"),
        ({"output": Path("nowhere/segments.png")}, "folder that does not exist", "make the folder first"),
        ({"texts": ()}, "exactly one of", "--prompt"),
        ({"images": (Path("none.png"),), "texts": ()}, "no such image", "check the path"),
        ({"sounds": (Path("none.wav"),), "texts": ()}, "no such recording", "check the path"),
    ],
    ids=str,
)
def test_a_mistake_is_told_with_what_to_do(given: dict[str, object], what: str, hint: str) -> None:
    with pytest.raises(PeftfxError, match=what) as caught:
        Asked(**{"directory": Path("out"), "texts": ("a",), **given}).check()  # type: ignore[arg-type]
    assert caught.value.where
    assert hint in (caught.value.hint or "")


def test_endings_may_be_of_any_case(tmp_path: Path) -> None:
    Asked(Path("out"), texts=("a",), save=tmp_path / "ROWS.NPY", output=tmp_path / "a.Png").check()


def test_one_prompt_a_run(peftfx: Callable[..., Result]) -> None:
    result = peftfx("run", "out", "--prompt", "w5", "--prompt", "w6")
    assert result.code == 2
    assert "--prompt is given 2 times" in result.err


SIZES = {"vocab_size": 99, "bos_token_id": 2, "eos_token_id": None}


def test_a_text_beyond_learned_positions_is_refused_in_words(tmp_path: Path, peftfx: Callable[..., Result]) -> None:
    torch.manual_seed(0)
    config = hf.GPT2Config(n_embd=32, n_layer=1, n_head=4, n_positions=16, **SIZES)
    directory = exported(hf.GPT2LMHeadModel(config).eval(), tmp_path / "out")
    result = peftfx("run", directory, "--prompt", " ".join(f"w{i}" for i in range(5, 25)))
    assert result.code == 2
    assert "row 16 of a table of 16 rows, in transformer.wpe" in result.err
    assert "give a shorter text" in result.err


def test_a_text_beyond_the_configs_positions_is_told(tmp_path: Path, peftfx: Callable[..., Result]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = hf.LlamaConfig(**sizes, max_position_embeddings=8, **SIZES)
    directory = exported(hf.LlamaForCausalLM(config).eval(), tmp_path / "out")
    result = peftfx("run", directory, "--prompt", "w5 w6 w7 w8", "--max-new-tokens", "6")
    assert result.code == 0
    assert "the text has 10 tokens, and the model's config tells 8" in result.err
