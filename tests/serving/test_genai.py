"""ONNX Runtime GenAI generates from our directory the tokens that our runtime does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.adapted import randomise
from support.decoding import Pair, make_pair, prompts
from support.few import but_for
from support.zoo import ZOO

import peftfx
from peftfx import runtime
from peftfx.caches.held import Held, KeptTensor
from peftfx.contract.method import Method
from peftfx.export.deployment.genai_config import GENAI_CONFIG, write_genai_config
from peftfx.views.decode import Decode

NEW = 24


@pytest.fixture(scope="module", params=but_for({"bloom"}, ["llama", "gpt2", "bloom"]))
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Path]:
    root = tmp_path_factory.mktemp(request.param)
    pair = make_pair(request.param, root / "adapter")
    pair.ours.export(root / "out", view="decode", assets=pair.ours.base.config.save_pretrained)
    return pair, root / "out"


def test_the_config_names_what_the_graph_has(exported: tuple[Pair, Path]) -> None:
    _, directory = exported
    made, model = json.loads((directory / GENAI_CONFIG).read_text())["model"], runtime.load(directory)
    decoder = made["decoder"]
    names = {name for key, name in decoder["inputs"].items() if not key.startswith("past")}
    names |= {decoder["inputs"][f"past_{k}_names"] % i for k in ("key", "value") for i in range(2)}
    assert names == set(model.model.inputs)
    assert model.model.axes["past_key_values.0.key"][1::2] == (decoder["num_key_value_heads"], decoder["head_size"])
    assert (made["eos_token_id"], made["pad_token_id"]) == (3, 1)


def test_genai_generates_our_tokens_alone_and_in_a_batch_padded_on_the_right(exported: tuple[Pair, Path]) -> None:
    pytest.importorskip("onnxruntime_genai")
    pair, directory = exported
    left = prompts(3)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 1000}  # there is none
    want = pair.peft.generate(**left, **options)[:, left["input_ids"].shape[1] :]
    made = json.loads((directory / GENAI_CONFIG).read_text())
    made["model"]["eos_token_id"] = next(i for i in range(4, 99) if i not in want)  # so that every row is as long
    (directory / GENAI_CONFIG).write_text(json.dumps(made))
    right = padded_on_the_right(**left)
    for given, expected in ((right, want), (right[:1], want[:1])):
        assert torch.equal(genai_tokens(directory, given), expected)


@pytest.mark.parametrize("method", [pytest.param(peftfx.PrefixTuning, marks=pytest.mark.slow), peftfx.PromptTuning])
def test_genai_sees_nothing_of_a_soft_prompt_but_what_it_does(method: type[Method], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    adapted = peftfx.transform(ZOO["llama"].build(), method(num_virtual_tokens=3), seed=0)
    randomise(adapted.adapters)
    adapted.export(tmp_path / "out", view="decode", assets=adapted.base.config.save_pretrained)
    given = prompts(1)
    options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": 1000}
    want = runtime.load(tmp_path / "out").generate(**given, **options)[:, given["input_ids"].shape[1] :]
    made = json.loads((tmp_path / "out" / GENAI_CONFIG).read_text())
    assert made["model"]["context_length"] == adapted.base.config.max_position_embeddings - 3
    made["model"]["eos_token_id"] = next(i for i in range(4, 99) if i not in want)
    (tmp_path / "out" / GENAI_CONFIG).write_text(json.dumps(made))
    assert torch.equal(genai_tokens(tmp_path / "out", given["input_ids"]), want)
    with adapted.disable_adapter():
        assert not torch.equal(adapted.generate(**given, **options)[:, given["input_ids"].shape[1] :], want)


def padded_on_the_right(input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    rows = [ids[mask.bool()] for ids, mask in zip(input_ids, attention_mask, strict=True)]
    length = max(map(len, rows))
    return torch.stack([torch.nn.functional.pad(row, (0, length - len(row)), value=1) for row in rows])


def genai_tokens(directory: Path, given: torch.Tensor) -> torch.Tensor:
    """The tokens that GenAI adds to prompts, greedily."""
    import onnxruntime_genai as og

    model = og.Model(str(directory))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=given.shape[1] + NEW, batch_size=len(given), do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(given.numpy().astype(np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return torch.stack([torch.tensor(generator.get_sequence(i))[given.shape[1] :].long() for i in range(len(given))])


def test_a_cache_that_genai_has_no_words_for_gets_no_config(tmp_path: Path) -> None:
    config = ZOO["llama"].make().config
    key, *values = (KeptTensor(n, (2, None, w), torch.float32) for n, w in (("key", 8), ("value", 8), ("value", 16)))
    narrow, wide = (Held((key, value)) for value in values)
    assert "one number for all" in write_genai_config(tmp_path, config, Decode((narrow, wide), positions=True))
    assert "one number for all" in write_genai_config(tmp_path, config, Decode((wide, wide), positions=True))
    assert not list(tmp_path.iterdir())
    assert write_genai_config(tmp_path, config, Decode((narrow, narrow), positions=False)) == ""
    assert "position_ids" not in (tmp_path / GENAI_CONFIG).read_text()
