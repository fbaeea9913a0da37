"""Adapters by row, and swapped, in encoder-decoders, mostly of sound or images: token by token what `peft` writes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.few import but_for
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError, export_onnx, runtime

pytestmark = pytest.mark.further

_ENDS = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 4}
_SIZES = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "init_std": 0.5}
_ENCODER = {"encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8}
_LENGTHS = {"max_source_positions": 16, "max_target_positions": 32}
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
ADAPTERS: dict[str, dict[str, Any]] = {
    "low": {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj", "fc1"]},
    "dora": {"r": 3, "use_dora": True, "target_modules": ["k_proj", "fc2"]},
}


def whisper() -> nn.Module:
    own = {**_ENDS, "begin_suppress_tokens": None, "vocab_size": 64}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**_SIZES, **_ENCODER, **_LENGTHS, **own))


def describing() -> nn.Module:
    layers = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    seeing = hf.ViTConfig(**layers, image_size=16, patch_size=8, initializer_range=0.3)
    writing = hf.TrOCRConfig(**_SIZES, vocab_size=60, max_position_embeddings=32, cross_attention_hidden_size=32)
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(seeing, writing)
    for name, token in _ENDS.items():
        setattr(config, name, token)
    model = hf.VisionEncoderDecoderModel(config)
    model.generation_config = hf.GenerationConfig(**_ENDS)
    return model


SOURCES: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "sound": (whisper, "input_features", (8, 32)),
    "an image": (describing, "pixel_values", (3, 16, 16)),
}


def build(name: str) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return SOURCES[name][0]().eval()


def given_to(name: str, rows: int) -> dict[str, Tensor]:
    _, source, shape = SOURCES[name]
    return {source: torch.randn(rows, *shape, generator=torch.Generator().manual_seed(rows))}


Case = tuple[str, dict[str | None, Any], Path]


@pytest.fixture(scope="module", params=but_for({"an image"}, SOURCES))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A model without an adapter and with each in `peft`, and where the adapters are."""
    root = tmp_path_factory.mktemp("sources")
    theirs: dict[str | None, Any] = {None: build(request.param)}
    for adapter, fields in ADAPTERS.items():
        theirs[adapter] = peft.get_peft_model(build(request.param), peft.LoraConfig(**fields)).eval()
        randomise(theirs[adapter])
        theirs[adapter].save_pretrained(str(root / adapter))
    return request.param, theirs, root


def test_each_row_has_its_own_adapter(case: Case) -> None:
    name, theirs, root = case
    ours = peftfx.load(build(name), root / "low", adapter_name="low")
    ours.load_adapter(root / "dora", "dora")
    ours.export(root / "rows", view="decode", batched=["low", "dora"], assets=ours.base.config.save_pretrained)
    served = runtime.load(root / "rows")
    for names in (["dora", None, "low"], ["low"]):
        given = given_to(name, len(names))
        for beams in (1, 2):
            options = {**GREEDY, "num_beams": beams}
            got = served.generate(**given, **options, adapter_ids=names)
            for row, adapter in enumerate(names):
                alone = {key: value[row : row + 1] for key, value in given.items()}
                assert torch.equal(got[row : row + 1], theirs[adapter].generate(**alone, **options))
    given = given_to(name, 2)
    assert torch.equal(served.generate(**given, **GREEDY), theirs[None].generate(**given, **GREEDY))
    with pytest.raises(PeftfxError, match="2 rows need 2 adapters, not 3"):
        served.generate(**given, **GREEDY, adapter_ids=["low", "low", None])


@pytest.mark.slow
def test_adapters_are_swapped(case: Case) -> None:
    name, theirs, root = case
    model = build(name)
    export_onnx(model, root / "slots", slots="all-linear", view="decode", assets=model.config.save_pretrained)
    served = runtime.load(root / "slots")
    for adapter in ADAPTERS:
        ours = peftfx.load(build(name), root / adapter)
        served.load_adapter(peftfx.export_adapter(ours, root / "slots", root / f"{adapter}.onnx_adapter"), adapter)
    assert "prompt" not in {slot for graph in served.graphs.values() for slot in graph.axes}
    for adapter in (*ADAPTERS, None):
        served.set_adapter(adapter)
        for rows in (1, 3):
            given = given_to(name, rows)
            assert torch.equal(served.generate(**given, **GREEDY), theirs[adapter].generate(**given, **GREEDY))
    with pytest.raises(PeftfxError, match="no adapters to choose from"):
        served.generate(**given_to(name, 1), **GREEDY, adapter_ids=torch.tensor([-1]))


def test_a_model_that_makes_its_table_of_positions_longer_is_swapped(tmp_path: Path) -> None:
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes = {**heads, **dict.fromkeys(("encoder_layers", "decoder_layers"), 1), "max_position_embeddings": 16}
    widths = {"d_model": 16, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "init_std": 0.5}
    config = hf.FSMTConfig(src_vocab_size=40, tgt_vocab_size=40, **sizes, **widths, langs=["en", "de"])
    torch.manual_seed(0)
    base = hf.FSMTForConditionalGeneration(config).eval()
    export_onnx(base, tmp_path / "graph", view="decode", slots="all-linear")
    rule = peftfx.LoRA(r=3, target="attention.query | mlp", init_lora_weights=False)
    adapted = peftfx.transform(base, rule)
    peftfx.export_adapter(adapted, tmp_path / "graph", tmp_path / "low.onnx_adapter")
    served = runtime.load(tmp_path / "graph")
    prompt = {"input_ids": torch.randint(5, 40, (2, 9))}
    plain = served.generate(**prompt, **GREEDY)
    served.load_adapter(tmp_path / "low.onnx_adapter")
    found = served.generate(**prompt, **GREEDY)
    assert torch.equal(found, adapted.generate(**prompt, **GREEDY))
    assert not torch.equal(found, plain)


@pytest.mark.parametrize("batched", [False, True])
def test_virtual_tokens_count_as_tokens_where_a_table_of_positions_grows(batched: bool, tmp_path: Path) -> None:
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 2)
    sizes = {**heads, **dict.fromkeys(("encoder_layers", "decoder_layers"), 1), "max_position_embeddings": 16}
    config = hf.M2M100Config(vocab_size=40, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, init_std=0.5, **sizes)
    torch.manual_seed(0)
    rule = peftfx.PromptTuning(num_virtual_tokens=3)
    adapted = peftfx.transform(hf.M2M100ForConditionalGeneration(config).eval(), rule, "prompt")
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_()
    report = adapted.export(tmp_path / "graph", view="decode", **({"batched": ["prompt"]} if batched else {}))
    told = "encoder_model: encoder_sequence + 5 <= 18 (the model is made for no more tokens)"
    assert told in report.sizes
    served = runtime.load(tmp_path / "graph", adapter="prompt" if batched else None)
    prompt = {"input_ids": torch.randint(5, 40, (2, 13))}  # with the prompt, as long as the model is made for
    assert torch.equal(served.generate(**prompt, **GREEDY), adapted.generate(**prompt, **GREEDY))
