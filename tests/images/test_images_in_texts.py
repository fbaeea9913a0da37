"""Models that write encoded images into embedded text: a text has any number of them, and a token for each feature."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import peft
import pytest
import torch
import transformers as hf
from every_model.checks import build
from support.adapted import randomise
from support.few import but_for
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError
from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.processors.pictures import pictures_of
from peftfx.export import OnnxModel
from peftfx.views.forward_axes import axes_of_forward

TASK = "image-text-to-text"
OF_TEXTS = r".*language_model.*\.(q_proj|v_proj)"


def saved(kind: str, directory: Path, targets: str = "all-linear", alpha: int = 8) -> peft.PeftModel:
    made = peft.get_peft_model(build(TASK, kind), peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=targets))
    randomise(made.eval())
    made.save_pretrained(str(directory))
    return made


def call(model: peftfx.AdaptedModel, texts: int, images: int, length: int = 6) -> dict[str, Tensor]:
    return example_inputs(model.base, sizes={"batch": texts, "sequence": length, "images": images}, seed=images)


def hold(want: peft.PeftModel, served: OnnxModel, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected = want(**inputs).logits
    shown = inputs.get("decoder_attention_mask", inputs["attention_mask"]).bool()
    found = served(**inputs)["logits"]
    shown = shown if shown.shape == found.shape[:2] else torch.ones(found.shape[:2], dtype=torch.bool)
    torch.testing.assert_close(found[shown], expected[shown], atol=3e-5, rtol=3e-4)


KINDS, FURTHER = (
    ("gemma3", "paligemma", "fuyu"),
    ("aya_vision", "blip-2", "chameleon", "florence2", "internvl", "kosmos-2"),
)


@pytest.mark.parametrize(
    "kind",
    [
        *but_for({"gemma3"}, KINDS),
        *(pytest.param(kind, marks=pytest.mark.further) for kind in FURTHER),
    ],
)
def test_a_text_has_any_number_of_images(kind: str, tmp_path: Path) -> None:
    want = saved(kind, tmp_path / "adapter")
    model = peftfx.load(build(TASK, kind), tmp_path / "adapter")
    model.export(tmp_path / "out", view="forward")
    served = OnnxModel(tmp_path / "out")
    assert served.axes["pixel_values"][0] == "images"
    for texts, images, length in ((1, 2, 5), (2, 3, 9), (3, 1, 4), (3, 5, 7), (2, 2, 6), (1, 1, 3)):
        hold(want, served, call(model, texts, images, length))


@pytest.mark.further
def test_a_text_attends_to_any_number_of_images(tmp_path: Path) -> None:
    """Beside the text, in layers of their own: `pixel_values` has an axis for the images of a text."""
    want = saved("mllama", tmp_path / "adapter")
    model = peftfx.load(build(TASK, "mllama"), tmp_path / "adapter")
    model.export(tmp_path / "out", view="forward")
    served = OnnxModel(tmp_path / "out")
    for texts, images in ((2, 1), (1, 3), (3, 2)):
        inputs = example_inputs(model.base, sizes={"batch": texts, "sequence": 5}, seed=images)
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask", "cross_attention_mask"):
            several = [inputs[name].roll(i, 0) for i in range(images)]
            inputs[name] = torch.cat(several, 2 if name == "cross_attention_mask" else 1)
        hold(want, served, inputs)


def test_an_example_deals_images_out_to_its_texts() -> None:
    base = build(TASK, "gemma3")
    for texts, images, each in ((2, 3, [2, 1]), (3, 1, [1, 0, 0]), (1, 4, [4]), (2, 2, [1, 1])):
        made = example_inputs(base, sizes={"batch": texts, "sequence": 8, "images": images})
        assert made["pixel_values"].shape[0] == images
        of_images = made["input_ids"] == base.config.image_token_id
        assert of_images.sum(1).tolist() == [n * 4 for n in each]
        assert torch.equal(of_images.long(), made["token_type_ids"])
        assert made["input_ids"].shape[1] == 8 + 4 * max(each)
        assert not (of_images & ~made["attention_mask"].bool()).any()


def test_a_model_that_pairs_texts_with_images_counts_them_together() -> None:
    model = build(TASK, "git")
    assert axes_of_forward(model, example_inputs(model))["pixel_values"][0] == "batch"


#: How the code compares: by a sum of the mask, by taking what is at the places, or in `index_put` itself.
@pytest.mark.further
@pytest.mark.parametrize("kind", but_for({"gemma3", "gemma4_unified"}, ("gemma3", "gemma4_unified", "kosmos-2")))
def test_as_many_features_as_tokens(kind: str, tmp_path: Path) -> None:
    model = peftfx.transform(build(TASK, kind), peftfx.LoRA(r=2))
    model.export(tmp_path / "out", view="forward")
    served = OnnxModel(tmp_path / "out")
    session = ort.InferenceSession(tmp_path / "out" / "model.onnx")  # whoever serves it
    name, token = ("image_embeds_position_mask", 1) if kind == "kosmos-2" else ("input_ids", 98)
    for more in (-1, 1):
        inputs = call(model, 2, 2)
        own = inputs[name]
        pieces = int((own == token).sum())
        if more < 0:
            own[0, (own[0] == token).nonzero()[0]] = 5 * (kind != "kosmos-2")
        else:
            own[0, -1] = token
        with pytest.raises((ValueError, RuntimeError)), torch.no_grad():
            model(**inputs)
        wrong = f"the text has {pieces + more} tokens of images or sounds, and these have {pieces} features"
        with pytest.raises(PeftfxError, match=wrong):
            served(**inputs)
        with pytest.raises(Exception, match="ScatterND"):
            session.run(None, {n: v.numpy() for n, v in inputs.items() if n in served.inputs})
        if kind == "gemma3":  # the graph in torch
            with pytest.raises(RuntimeError, match="shape mismatch"):
                model.graph()(**inputs)


@pytest.mark.further
def test_a_decoder_takes_as_many_features_as_tokens(tmp_path: Path) -> None:
    model = peftfx.transform(build(TASK, "gemma3"), peftfx.LoRA(r=2))
    model.export(tmp_path / "out", view="decode")
    served, view = OnnxModel(tmp_path / "out"), model.view("decode")
    assert view is not None
    inputs = view.inputs(model.base, sizes={"batch": 1, "sequence": 9, "past": 0, "image_tokens": 4}, seed=1)
    inputs = {name: value for name, value in inputs.items() if name in served.inputs}
    left = {name: served.axes[name] for name in served.inputs if name not in inputs}
    pasts = {n: torch.zeros([a if isinstance(a, int) else int(a == "batch") for a in own]) for n, own in left.items()}
    served(**inputs, **pasts)
    inputs["input_ids"] = inputs["input_ids"].clone()
    inputs["input_ids"][0, 2] = 5
    with pytest.raises(PeftfxError, match="the text has 3 tokens of images or sounds, and these have 4 features"):
        served(**inputs, **pasts)


@pytest.mark.further
@pytest.mark.parametrize("targets", [OF_TEXTS, "all-linear"])
def test_texts_with_images_choose_adapters(targets: str, tmp_path: Path) -> None:
    models = {name: saved("gemma3", tmp_path / name, targets, alpha) for name, alpha in (("a", 8), ("b", -6))}
    model = peftfx.load(build(TASK, "gemma3"), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "b", "b")
    model.export(tmp_path / "out", batched=["a", "b"])
    served = OnnxModel(tmp_path / "out")
    own = (models["b"], build(TASK, "gemma3"), models["a"])
    for images in (3, 4) if targets == OF_TEXTS else (3,):  # an adapter of the image encoder is that of the image's row
        inputs = call(model, 3, images)
        with torch.no_grad():
            rows = torch.stack([made(**inputs).logits[i] for i, made in enumerate(own)])
        found = served(**inputs, adapter_ids=torch.tensor([1, -1, 0]))["logits"]
        shown = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[shown], rows[shown], atol=3e-5, rtol=3e-4)
    if targets == "all-linear":
        with pytest.raises(PeftfxError, match="batch is 4 in one input, and 3 in input_ids"):
            served(**call(model, 3, 4), adapter_ids=torch.tensor([1, -1, 0]))


def prompted(kind: str, soft: peft.PeftConfig, directory: Path) -> tuple[peft.PeftModel, peftfx.AdaptedModel]:
    want = peft.get_peft_model(build(TASK, kind), soft).eval()
    randomise(want)
    want.save_pretrained(str(directory))
    return want, peftfx.load(build(TASK, kind), directory)


def behind_prompt(base: nn.Module, prompt: Tensor, given: dict[str, Tensor], types: str) -> Tensor:
    """Logits of the model's own code without a cache, whose first embedded tokens are the prompt."""
    count, rows, left = len(prompt), len(given["input_ids"]), [True]
    filler = {"input_ids": 5, "attention_mask": 1, types: 0}
    more = {n: torch.cat([torch.full((rows, count), v), given[n]], 1) for n, v in filler.items() if n in given}

    def put(module: nn.Module, args: object, found: Tensor) -> Tensor:
        return torch.cat([prompt.expand(rows, -1, -1), found[:, count:]], 1) if left and left.pop() else found

    handle = base.get_input_embeddings().register_forward_hook(put)
    try:
        return base(**{**given, **more}, use_cache=False).logits
    finally:
        handle.remove()


#: What an image's tokens see, or where they are, is told by the places of a text that a prompt moves on.
@pytest.mark.further
@pytest.mark.parametrize(("kind", "types"), [("gemma3", "token_type_ids"), ("qwen2_5_vl", "mm_token_type_ids")])
@torch.no_grad()
def test_a_prompt_before_images(kind: str, types: str) -> None:
    model = peftfx.transform(build(TASK, kind), peftfx.PromptTuning(num_virtual_tokens=3), seed=0)
    randomise(model, 3)
    (prompt,) = model.adapter("default").parameters()
    with pictures_of((64, 64) if kind == "qwen2_5_vl" else None):
        given = call(model, 1, 1)
        want = behind_prompt(build(TASK, kind), prompt.detach(), given, types)
        torch.testing.assert_close(model(**given).logits, want, atol=1e-5, rtol=1e-4)
        said = model.generate(**given, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
        torch.testing.assert_close(said.logits[0], want[:, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.further
@torch.no_grad()
def test_an_images_tokens_see_each_other_behind_a_prefix() -> None:
    """transformers looks up the types of tokens by their places behind the cache."""
    model = peftfx.transform(build(TASK, "gemma3"), peftfx.PrefixTuning(num_virtual_tokens=2), seed=0)
    randomise(model, 3)
    given, base = call(model, 1, 1), build(TASK, "gemma3")
    (rows,) = model.adapter("default").parameters()
    layers = base.config.text_config.num_hidden_layers
    table = rows.detach().view(2, 2 * layers, -1, base.config.text_config.head_dim).permute(1, 2, 0, 3)[:, None]
    cache = hf.DynamicCache()
    for layer in range(layers):
        cache.update(table[2 * layer], table[2 * layer + 1], layer)
    more = {"attention_mask": torch.ones(1, 2 + given["input_ids"].shape[1], dtype=torch.long)}
    more["token_type_ids"] = torch.cat([torch.zeros(1, 2, dtype=torch.long), given["token_type_ids"]], 1)
    want = base(**{**given, **more}, cache=cache).logits
    torch.testing.assert_close(model(**given).logits, want, atol=1e-5, rtol=1e-4)
    said = model.generate(**given, max_new_tokens=1, output_logits=True, return_dict_in_generate=True)
    torch.testing.assert_close(said.logits[0], want[:, -1], atol=1e-5, rtol=1e-4)


@pytest.mark.further
@torch.no_grad()
def test_a_prefix_has_a_place_where_code_reads_an_images_size(tmp_path: Path) -> None:
    with pictures_of((64, 64)):
        want, model = prompted(
            "qwen2_5_vl", peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), tmp_path
        )
        ids = torch.tensor([[4, 5, 9], [7, 8, 3]])
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        torch.testing.assert_close(model(**text).logits, want(**text).logits, atol=1e-5, rtol=1e-4)
