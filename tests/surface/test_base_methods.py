"""Methods of a base run with the active adapters, as they do on HF PEFT's model, or are refused."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise, trained
from support.words import word_tokenizer
from torch import Tensor, nn

import peftfx
from peftfx.errors import PeftfxError

PIXELS = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TEXTS = torch.randint(3, 40, (3, 7), generator=torch.Generator().manual_seed(1))


class Scorer(nn.Module):
    """A user's own module with methods beside its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.drop = nn.Linear(6, 8), nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.encode(x))

    def encode(self, x: Tensor) -> Tensor:
        return self.drop(torch.tanh(self.first(x)))

    def each(self, x: Tensor) -> Iterator[Tensor]:
        yield from (self.forward(row) for row in x)

    def part(self) -> nn.Module:
        return self.first

    def widen(self) -> None:
        self.second = nn.Linear(8, 9)

    def count(self) -> int:
        return 2


def scorer() -> nn.Module:
    torch.manual_seed(0)
    return Scorer()


def clip() -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**size, "vocab_size": 40, "max_position_embeddings": 16, "eos_token_id": 2, "projection_dim": 8}
    vision = {**size, "image_size": 16, "patch_size": 8, "projection_dim": 8}
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))


def pair(base: Any, targets: list[str], **inputs: Tensor) -> tuple[nn.Module, peftfx.AdaptedModel]:
    theirs = peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=targets, lora_dropout=0.1))
    randomise(theirs)
    rule = peftfx.LoRA(r=2, target_modules=targets, lora_dropout=0.1)
    ours = peftfx.transform(base(), rule, inputs=inputs or None)
    peftfx.set_peft_model_state_dict(ours, peft.get_peft_model_state_dict(theirs))
    return theirs, ours


def contrastive(model: Any) -> Tensor:
    images, texts = model.get_image_features(pixel_values=PIXELS), model.get_text_features(input_ids=TEXTS)
    images, texts = (getattr(found, "pooler_output", found) for found in (images, texts))
    return nn.functional.cross_entropy(texts @ images.T, torch.arange(3))


def encoded(model: Any) -> Tensor:
    return model.encode(torch.ones(2, 6)).pow(2).mean()


@pytest.mark.parametrize(
    ("base", "targets", "loss", "inputs"),
    [
        (clip, ["q_proj", "visual_projection", "text_projection"], contrastive, {}),
        (scorer, ["first", "second"], encoded, {"x": torch.ones(2, 6)}),
    ],
    ids=["clip", "own"],
)
def test_training_through_another_method_takes_the_steps_of_peft(
    base: Any, targets: list[str], loss: Any, inputs: dict[str, Tensor]
) -> None:
    models = pair(base, targets, **inputs)
    seen = [trained(model.train(), functools.partial(loss, model), rate=0.01) for model in models]
    assert seen[0] == pytest.approx(seen[1], abs=1e-7)
    assert len(set(seen[0])) == 4
    saved, own = peft.get_peft_model_state_dict(models[0]), peftfx.get_peft_model_state_dict(models[1])
    assert all(torch.allclose(own[name], tensor, atol=1e-6) for name, tensor in saved.items())
    with models[0].disable_adapter(), models[1].disable_adapter():
        torch.manual_seed(0)
        first = loss(models[0])
        torch.manual_seed(0)
        assert torch.equal(first, loss(models[1]))


def test_methods_of_a_reference_have_its_adapters() -> None:
    theirs, ours = pair(clip, ["q_proj", "visual_projection"])
    reference = ours.reference()
    with theirs.disable_adapter(), torch.no_grad():
        want = theirs.eval().get_image_features(pixel_values=PIXELS).pooler_output
    ours.eval()
    assert torch.equal(reference.get_image_features(pixel_values=PIXELS).pooler_output, want)
    assert not torch.allclose(ours.get_image_features(pixel_values=PIXELS).pooler_output, want)


def test_a_reference_generates_without_the_adapters() -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**size, num_attention_heads=2)).eval()
    want = base.generate(input_ids=TEXTS, max_new_tokens=6, do_sample=False)
    ours = peftfx.transform(base, peftfx.LoRA(r=2, init_lora_weights=False, target="attention | mlp", lora_alpha=60))
    assert torch.equal(ours.reference().generate(input_ids=TEXTS, max_new_tokens=6, do_sample=False), want)
    assert not torch.equal(ours.generate(input_ids=TEXTS, max_new_tokens=6, do_sample=False), want)


def test_a_pipeline_of_transformers_writes_with_the_adapters() -> None:
    torch.manual_seed(0)
    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**size, num_attention_heads=2, initializer_range=0.3)).eval()
    ours = peftfx.transform(base, peftfx.LoRA(r=2, init_lora_weights=False, lora_alpha=60), seed=0).eval()
    tokenizer = word_tokenizer([f"w{number}" for number in range(40)], unk_token="w0", pad_token="w0", eos_token="w2")
    writes = hf.pipeline("text-generation", model=ours, tokenizer=tokenizer)
    ((found,),) = writes(["w5 w6"], max_new_tokens=5, do_sample=False, return_tensors=True)
    want = ours.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False)
    assert found["generated_token_ids"] == want[0].tolist()
    with ours.disable_adapter():
        assert not ours.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False).equal(want)


def test_what_runs_no_module_is_called() -> None:
    _, ours = pair(clip, ["q_proj"])
    assert ours.num_parameters() > 0
    assert ours.can_generate() is False
    ours.set_attn_implementation("eager")
    assert ours.base.config._attn_implementation == "eager"


def test_what_returns_code_that_would_run_later_is_refused() -> None:
    _, ours = pair(scorer, ["first"], x=torch.ones(2, 6))
    assert ours.count() == 2
    for method, arguments in ((ours.each, [torch.ones(2, 6)]), (ours.part, [])):
        with pytest.raises(PeftfxError, match="would run without the adapters"):
            method(*arguments)


def test_a_method_that_exchanges_modules_is_refused() -> None:
    _, ours = pair(scorer, ["first"], x=torch.ones(2, 6))
    with pytest.raises(PeftfxError, match="exchanged modules or parameters"):
        ours.widen()


def test_where_modules_cannot_run_the_adapter_the_method_is_refused() -> None:
    rule, inputs = peftfx.LoRA(target_modules=["first"]), {"x": torch.ones(2, 6)}
    ours = peftfx.transform(scorer(), rule, inputs=inputs, road="graph")
    assert not hasattr(ours, "encode")
    with pytest.raises(AttributeError, match=r"encode\(\) of the base would run without the adapters"):
        ours.encode(torch.ones(2, 6))


def test_torch_exports_an_adapted_model_strictly() -> None:
    _, ours = pair(scorer, ["first", "second"], x=torch.ones(2, 6))
    program = torch.export.export(ours.eval(), (torch.ones(2, 6),), strict=True)
    x = torch.randn(2, 6)
    torch.testing.assert_close(program.module()(x), ours(x))


@pytest.mark.parametrize("road", ["modules", "graph"])
def test_parameters_are_counted_with_those_of_adapters(road: Any) -> None:
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_attention_heads=2))
    theirs = peft.get_peft_model(base, peft.LoraConfig(r=2))
    want = [theirs.num_parameters(only_trainable=some) for some in (False, True)]
    ours = peftfx.transform(theirs.unload(), peft.LoraConfig(r=2), road=road)
    assert [ours.num_parameters(only_trainable=some) for some in (False, True)] == want
