"""Files with copies of tied tensors (`ensure_weight_tying`, biases): they act at all modules that have the tensor."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support.adapted import randomise, trained
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx as px
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export.summaries.about import about
from peftfx.export.summaries.differences import differences
from peftfx.rules.tied_copies import with_tied_names

IDS = torch.tensor([[1, 5, 9, 7, 2], [3, 3, 2, 0, 60]])


def _base() -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = hf.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    return hf.LlamaForCausalLM(config).eval()


def _masked() -> hf.BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return hf.BertForMaskedLM(hf.BertConfig(**sizes, num_attention_heads=4)).eval()


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def _losses(model: nn.Module, ids: Tensor) -> list[float]:
    return trained(model, lambda: model(input_ids=ids, labels=ids).loss, rate=0.02)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["lm_head"]},
        {"target_modules": r".*(q_proj|embed_tokens)"},
    ],
)
def test_a_file_with_tied_copies_acts_as_in_peft(options: dict[str, object], tmp_path: Path) -> None:
    trained = peft.get_peft_model(_base(), peft.LoraConfig(r=3, ensure_weight_tying=True, **options)).eval()
    with torch.no_grad():
        for n, p in enumerate(p for p in trained.parameters() if p.requires_grad):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(n)) * 0.2)
    trained.save_pretrained(tmp_path / "theirs")
    want = _logits(trained)
    assert not torch.allclose(want, _logits(_base()), atol=0.1)
    apart = "modules_to_save" not in options
    told = pytest.warns(PeftfxWarning, match="trained on here, the LoRAs at the tied tensor change apart")
    with told if apart else contextlib.nullcontext():
        loaded = px.load(_base(), tmp_path / "theirs")
    torch.testing.assert_close(_logits(loaded), want, rtol=1e-5, atol=1e-5)
    loaded.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(_base(), tmp_path / "ours").eval()
    torch.testing.assert_close(_logits(again), want, rtol=1e-5, atol=1e-5)
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["ensure_weight_tying"] is not apart
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "ours")]
    assert apart or files[0].keys() == files[1].keys()
    assert "lora(" in str(about(tmp_path / "theirs"))
    assert not differences(tmp_path / "theirs", tmp_path / "theirs").tensors
    px.export_onnx(loaded, tmp_path / "onnx", view="forward")
    served = px.runtime.load(tmp_path / "onnx")
    got = served(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("road", ["modules", "graph"])
@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"]], ids=str)
def test_one_copy_of_a_tied_tensor_trains_as_in_peft(saved: list[str], road: str, tmp_path: Path) -> None:
    """It was refused; a loaded one was two copies, which an optimizer changed apart."""
    config = peft.LoraConfig(r=3, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=True)
    theirs = peft.get_peft_model(_base(), copy.deepcopy(config))
    with torch.no_grad():
        theirs.base_model.model.lm_head.weight.mul_(1.5)
    theirs.save_pretrained(tmp_path / "theirs")
    new = px.transform(_base(), config, road=road)
    assert new.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours = px.load(_base(), tmp_path / "theirs", is_trainable=True, road=road)
    assert (ours.road, ours.get_nb_trainable_parameters()) == (road, new.get_nb_trainable_parameters())
    seen = [_losses(model, IDS) for model in (theirs.eval(), ours.eval())]
    assert seen[1] == pytest.approx(seen[0], abs=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(_base(), tmp_path / "ours").eval()
    torch.testing.assert_close(_logits(again), _logits(theirs), rtol=1e-4, atol=1e-4)
    merged = ours.merge_and_unload()
    torch.testing.assert_close(_logits(merged), _logits(theirs), rtol=1e-4, atol=1e-4)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_only_what_is_tied_is_named_and_training_tied_loras_is_refused() -> None:
    base = _base()
    config = {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}
    assert with_tied_names(config, base) == {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}
    assert with_tied_names({**config, "target_modules": ["q_proj"]}, base) == {"target_modules": ["q_proj"]}
    named = {"target_modules": config["target_modules"]}
    assert with_tied_names({**config, "ensure_weight_tying": False}, base) == named
    base.lm_head.weight = nn.Parameter(base.lm_head.weight.detach().clone())
    assert with_tied_names(config, base) == named
    rule = peft.LoraConfig(target_modules=["embed_tokens"], ensure_weight_tying=True)
    with pytest.raises(PeftfxError, match="HF PEFT trains two LoRAs over one memory there"):
        px.transform(_base(), rule)


TIED_BIASES = {
    "biases": ({"target_modules": ["query"], "bias": "all"}, {"bias", "decoder.bias"}),
    "head": ({"target_modules": ["query"], "bias": "all", "modules_to_save": ["decoder"]}, {"bias", "decoder.bias"}),
    "layer": ({"target_modules": ["query", "decoder"], "bias": "lora_only"}, {"decoder.base_layer.bias"}),
}


@pytest.mark.parametrize("case", TIED_BIASES)
@pytest.mark.parametrize("road", ["modules", "graph"])
def test_a_tied_bias_is_trained_on_under_each_of_its_names(road: str, case: str, tmp_path: Path) -> None:
    """HF PEFT's `bias="all"` saves each name of BERT's output bias, "lora_only" that in the layer: it is one tensor."""
    options, in_file = TIED_BIASES[case]
    theirs = peft.get_peft_model(_masked(), peft.LoraConfig(r=2, **options))
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    names = {n for n in load_file(tmp_path / "theirs" / "adapter_model.safetensors") if "predictions" in n}
    assert {n.removeprefix("base_model.model.cls.predictions.") for n in names} >= in_file
    ours = px.load(_masked(), tmp_path / "theirs", road=road)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(0))
    seen = [_losses(model, ids) for model in (theirs.eval(), ours)]
    assert seen[1] == pytest.approx(seen[0], abs=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(_masked(), str(tmp_path / "ours")).eval()
    torch.testing.assert_close(back(input_ids=ids).logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_biases_inside_a_trained_head_of_several_layers_are_repeats(task: str | None, tmp_path: Path) -> None:
    """HF PEFT's `bias="all"` saves each bias in a trained copy three times: a file with RoBERTa's head was refused."""
    config = peft.LoraConfig(r=2, target_modules=["query"], bias="all", modules_to_save=["classifier"], task_type=task)
    theirs = peft.get_peft_model(ZOO["roberta"].build(), config).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path))
    names = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.classifier.modules_to_save.default.dense.bias" in names
    ours, given = px.load(ZOO["roberta"].build(), tmp_path), ZOO["roberta"].inputs(3, 5)
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_tied_head_acts_where_peft_does_not_know_the_embedding_of_the_file(tmp_path: Path) -> None:
    """HF PEFT writes the embedding's path instead of the head's name, and does not find the head when it loads."""
    base = ZOO["bloom"].build().eval()
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, target_modules=["lm_head"], ensure_weight_tying=True)
    )
    randomise(theirs)
    theirs.eval().save_pretrained(str(tmp_path))
    ours, given = px.load(base, tmp_path), {"input_ids": IDS}
    torch.testing.assert_close(ours(**given).logits, theirs(**given).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning")
@pytest.mark.parametrize(
    ("base", "names"),
    [
        *((_base, ["q_proj"]), (ZOO["llama"].build, ["q_proj", "embed_tokens"]), (ZOO["vit"].build, "all-linear")),
        *((_masked, ["query", "decoder"]), (_masked, r".*\.(query|decoder)")),
    ],
)
def test_tying_of_nothing_is_told_and_left_out(
    base: Callable[[], nn.Module], names: list[str] | str, tmp_path: Path
) -> None:
    """It was refused, and HF PEFT warns and goes on."""
    config = peft.LoraConfig(r=3, target_modules=names, ensure_weight_tying=True)
    with pytest.warns(PeftfxWarning, match="ensure_weight_tying changes nothing, as in HF PEFT"):
        ours = px.transform(base(), config)
    with pytest.warns(UserWarning, match="no tied modules"):
        theirs = peft.get_peft_model(base(), config)
    theirs.save_pretrained(str(tmp_path))
    assert px.load(base(), tmp_path).get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("beside", [False, True])
def test_trained_rows_of_a_tied_embedding_are_in_a_file_twice(beside: bool, tmp_path: Path) -> None:
    """HF PEFT writes them so with `save_embedding_layers`, which it does by itself where tokens were added."""
    config = peft.TrainableTokensConfig(token_indices=[1, 5, 9])
    if beside:
        config = peft.LoraConfig(r=3, target_modules=["q_proj"], trainable_token_indices=[1, 5, 9])
    trained = peft.get_peft_model(_base(), config).eval()
    randomise(trained)
    trained.save_pretrained(tmp_path, save_embedding_layers=True)
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    assert sum(name.endswith("trainable_tokens_delta") for name in names) == 2
    found = px.load(_base(), tmp_path)
    torch.testing.assert_close(_logits(found), _logits(trained), rtol=1e-5, atol=1e-5)


class _Head(nn.Module):
    """A head in which two layers have one weight, and read it one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(8, n, bias=n == 3) for n in (8, 8, 3))
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.second(torch.tanh(self.first(x))))
        return found


def _headed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), _Head()).eval()


X = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
HEADS: dict[str, tuple[Callable[[], nn.Module], list[str], str, dict[str, Tensor]]] = {
    "layers": (_headed, ["0"], "1", {"input": X}),
    "bias": (_masked, ["query"], "cls", {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
}


def _loss(model: nn.Module, call: dict[str, Tensor]) -> Tensor:
    found = model(**call)
    return (found if isinstance(found, Tensor) else found.logits).square().mean()


@pytest.mark.parametrize("road", ["modules", "graph"])
@pytest.mark.parametrize("name", HEADS)
def test_a_copied_module_in_which_a_tensor_has_two_names_has_one_copy_of_it(
    name: str, road: str, tmp_path: Path
) -> None:
    """It had a copy for each name, of which one was trained: a merged model, or one road's file, had the other."""
    built, targets, head, call = HEADS[name]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=[head])
    theirs = peft.get_peft_model(built(), copy.deepcopy(config)).eval()
    theirs.save_pretrained(tmp_path / "theirs")
    ours = px.load(built(), tmp_path / "theirs", road=road, inputs=call)
    made = px.transform(built(), config, inputs=call, road=road)
    counts = theirs.get_nb_trainable_parameters()
    assert (ours.road, ours.get_nb_trainable_parameters(), made.get_nb_trainable_parameters()) == (road, counts, counts)
    plain = theirs.base_model if name == "layers" else theirs
    seen = [trained(m, lambda m=m: _loss(m, call), rate=0.05) for m in (plain, ours)]  # type: ignore[misc]
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    files = [load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("ours", "theirs")]
    torch.testing.assert_close(*files, rtol=1e-3, atol=1e-4)
    want = _loss(plain, call)
    torch.testing.assert_close(_loss(px.load(built(), tmp_path / "theirs", inputs=call), call), want)
    first = next(n for n in files[1] if n.endswith(("first.weight", "predictions.bias")))
    save_file(files[1] | {first: files[1][first] + 1}, tmp_path / "theirs" / "adapter_model.safetensors")
    torch.testing.assert_close(_loss(px.load(built(), tmp_path / "theirs", inputs=call), call), want)  # as torch loads
    merged = ours.merge_and_unload()
    torch.testing.assert_close(_loss(merged, call), want, rtol=1e-4, atol=1e-5)
    if name == "layers":
        assert merged[1].first.weight is merged[1].second.weight
    else:
        assert merged.cls.predictions.bias is merged.cls.predictions.decoder.bias
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(_loss(hf.BertForMaskedLM.from_pretrained(tmp_path / "merged").eval(), call), want)


def test_a_bias_of_two_names_in_a_copied_head_beside_all_biases_and_under_a_prompt(tmp_path: Path) -> None:
    lora = peft.LoraConfig(r=2, target_modules=["query"], bias="all", modules_to_save=["cls"])
    prompt = peft.PromptTuningConfig(num_virtual_tokens=3, modules_to_save=["cls"], task_type="FEATURE_EXTRACTION")
    for config in (lora, prompt):
        theirs = peft.get_peft_model(_masked(), config).eval()
        randomise(theirs)
        theirs.save_pretrained(tmp_path)
        ours = px.load(_masked(), tmp_path)
        call = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        torch.testing.assert_close(_loss(ours, call), _loss(theirs, call))
        randomise(ours, 3)
        ours.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(_masked(), tmp_path).eval()
        torch.testing.assert_close(_loss(again, call), _loss(ours, call))
