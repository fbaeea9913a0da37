"""Phi-3's longer rotary embeddings: where a text grows beyond a length, the cache is computed anew, served too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf

import peftfx
from peftfx import PeftfxError
from peftfx.generation.anew import OwnPreparation, computed_anew_beyond

pytestmark = pytest.mark.further

SHORT = 12  #: tokens


def model(kind: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **tokens)).eval()
    factors = {"short_factor": [1.0, 1.2, 1.4, 2.0], "long_factor": [2.0, 3.0, 4.0, 5.0]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SHORT, **factors}
    config = hf.Phi3Config(**sizes, **tokens, original_max_position_embeddings=SHORT, rope_parameters=rope)
    return hf.Phi3ForCausalLM(config).eval()


def test_the_length_is_found_by_asking_the_class() -> None:
    assert computed_anew_beyond(model("phi3")) == SHORT
    assert computed_anew_beyond(model("llama")) is None


def test_a_class_that_never_takes_such_a_cache_says_nothing() -> None:
    """XLNet hands memories on under another name: its cache would be dropped at every step."""
    config = hf.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48)
    assert not OwnPreparation(hf.XLNetLMHeadModel, config).drops_at(5)


def test_a_model_without_a_known_class_generates(
    phi3: tuple[peftfx.AdaptedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> type:
        raise PeftfxError("this model does not do text-generation", "", "")

    monkeypatch.setattr("peftfx.serving.generators.maker_of", unknown)
    adapted, directory = phi3
    given = {"input_ids": torch.tensor([[5, 8, 13]]), "min_new_tokens": 5, "max_new_tokens": 5}
    assert torch.equal(peftfx.runtime.load(directory).generate(**given), adapted.generate(**given))


@pytest.mark.parametrize("prompt", [4, 10, 14])
def test_a_served_text_goes_on_as_torchs(prompt: int, phi3: tuple[peftfx.AdaptedModel, Path]) -> None:
    adapted, directory = phi3
    served = peftfx.runtime.load(directory)
    tokens = torch.randint(3, 64, (2, prompt), generator=torch.Generator().manual_seed(prompt))
    mask = torch.ones_like(tokens)
    mask[0, :2], tokens[0, :2] = 0, 0
    for options in ({}, {"num_beams": 2}):
        given = {"input_ids": tokens, "attention_mask": mask, "min_new_tokens": 12, "max_new_tokens": 12, **options}
        assert torch.equal(served.generate(**given), adapted.generate(**given))


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> tuple[peftfx.AdaptedModel, Path]:
    adapted = peftfx.transform(model("phi3"), peftfx.LoRA(target="all-linear", init_lora_weights=False), seed=0)
    adapted.eval()
    directory = tmp_path_factory.mktemp("phi3") / "out"
    report = adapted.export(directory, view="decode")
    assert any(f"beyond {SHORT} tokens" in line for line in report.sizes)
    return adapted, directory
