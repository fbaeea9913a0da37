"""Models that compare each text with each image: their texts and their images are of any numbers, one by one."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError, export_onnx
from peftfx.bases.example_inputs import example_inputs
from peftfx.export import OnnxModel
from peftfx.views.forward_axes import axes_of_forward

LAYERS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**LAYERS, "vocab_size": 60, "max_position_embeddings": 32, "eos_token_id": 59, "bos_token_id": 1}
IMAGE = {**LAYERS, "image_size": 16, "patch_size": 8}
OF_TEXTS = ("input_ids", "attention_mask")


def build(kind: type[hf.PreTrainedModel] = hf.CLIPModel) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    return kind(hf.CLIPConfig(text_config=TEXT, vision_config=IMAGE, projection_dim=16)).eval()


def saved(directory: Path, targets: object = "all-linear", alpha: int = 8) -> peft.PeftModel:
    made = peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets)).eval()
    randomise(made)
    made.save_pretrained(str(directory))
    return made


def call(model: nn.Module, texts: int, images: int, length: int = 9) -> dict[str, Tensor]:
    """A call with these numbers of texts and images."""
    of_texts = example_inputs(model, sizes={"batch": texts, "sequence": length}, seed=texts)
    of_images = example_inputs(model, sizes={"batch": images}, seed=images + 10)
    return {name: (of_texts if name in OF_TEXTS else of_images)[name] for name in of_texts}


@pytest.mark.parametrize("given", [pytest.param(False, marks=pytest.mark.further), True])
def test_texts_and_images_of_different_numbers(given: bool, tmp_path: Path) -> None:
    want = saved(tmp_path / "adapter")
    adapted = peftfx.load(build(), tmp_path / "adapter")
    adapted.export(tmp_path / "out", inputs=call(adapted.base, 2, 2, 7) if given else None)
    got = OnnxModel(tmp_path / "out")
    for texts, images in ((3, 1), (1, 4), (1, 1), (2, 2)):
        inputs = call(adapted.base, texts, images)
        with torch.no_grad():
            expected = want(**inputs)
        found = got(**inputs)
        assert found["logits_per_image"].shape == (images, texts)
        for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
            torch.testing.assert_close(found[name], expected[name], atol=1e-4, rtol=1e-4)


def test_the_graph_runs_in_torch_for_other_numbers(tmp_path: Path) -> None:
    adapted = peftfx.load(build(), saved(tmp_path) and tmp_path)
    assert adapted.graph().sizes.keys() == {"batch", "sequence", "image_batch"}
    inputs = call(adapted.base, 5, 3)
    with torch.no_grad():
        torch.testing.assert_close(adapted.graph()(**inputs)["logits_per_text"], adapted(**inputs)["logits_per_text"])


class Paired(hf.CLIPModel):
    """A text for each image, as in models that read both at once."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        texts = self.get_text_features(input_ids, attention_mask).pooler_output
        return {"both": torch.cat([texts, self.get_image_features(pixel_values).pooler_output], dim=1)}


def test_texts_that_belong_to_images_are_counted_with_them(tmp_path: Path) -> None:
    model = build(Paired)
    assert axes_of_forward(model, example_inputs(model))["pixel_values"][0] == "batch"
    assert axes_of_forward(build(), example_inputs(model))["pixel_values"][0] == "image_batch"
    export_onnx(model, tmp_path / "out")
    inputs = call(model, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(OnnxModel(tmp_path / "out")(**inputs)["both"], model(**inputs)["both"])


class OneByOne(hf.CLIPModel):
    """Images that are encoded in a loop, which a capture repeats as often as the example has images."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        texts = self.get_text_features(input_ids, attention_mask).pooler_output
        images = [self.get_image_features(pixel_values[i : i + 1]).pooler_output for i in range(pixel_values.shape[0])]
        return {"near": texts @ torch.cat(images).mT}


def test_a_number_of_images_that_the_code_fixes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match=r"the model's code fixes the batch, here at 2.*pixel_values"):
        export_onnx(build(OneByOne), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_call_with_a_loss_of_pairs_counts_pairs() -> None:
    model = build()
    axes = axes_of_forward(model, {**example_inputs(model), "return_loss": True})
    assert axes["pixel_values"][0] == "batch"


def test_each_text_has_its_own_adapter_and_images_have_none(tmp_path: Path) -> None:
    of_texts = r"text_model\..*\.(q_proj|v_proj)"
    models = {name: saved(tmp_path / name, of_texts, alpha) for name, alpha in (("a", 8), ("b", -6))}
    adapted = peftfx.load(build(), tmp_path / "a", adapter_name="a")
    adapted.load_adapter(tmp_path / "b", "b")
    adapted.export(tmp_path / "out", batched=["a", "b"])
    inputs = call(adapted.base, 3, 2)
    found = OnnxModel(tmp_path / "out")(**inputs, adapter_ids=torch.tensor([1, -1, 0]))["logits_per_image"]
    with torch.no_grad():
        rows = [model(**inputs).logits_per_image for model in (models["b"], build(), models["a"])]
    torch.testing.assert_close(found, torch.stack([row[:, i] for i, row in enumerate(rows)], 1), atol=1e-4, rtol=1e-4)


def test_rows_of_texts_choose_no_adapters_of_images(tmp_path: Path) -> None:
    saved(tmp_path / "a", ["q_proj"])
    adapted = peftfx.load(build(), tmp_path / "a", adapter_name="a")
    with pytest.raises(PeftfxError, match=r"those of image_batch, and adapters are chosen by batch.*vision_model"):
        adapted.export(tmp_path / "out", batched=["a"])
    assert not (tmp_path / "out").exists()
