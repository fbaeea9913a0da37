"""The task that HF PEFT writes into an adapter's config, or the class that was trained, on bases of another one."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from every_model.checks import build
from support.adapted import randomise
from support.words import word_tokenizer

from peftfx.bases.example_inputs import example_inputs
from peftfx.bases.load import load_base
from peftfx.bases.tasks import resolve_task
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export.directories import load_directories

BASES = [
    ("image-text-to-text", "llava", "CAUSAL_LM"),
    pytest.param("image-text-to-text", "qwen2_vl", "CAUSAL_LM", marks=pytest.mark.further),
    ("speech-to-text", "whisper", "SEQ_2_SEQ_LM"),
    pytest.param("speech-to-text", "voxtral", "CAUSAL_LM", marks=pytest.mark.further),
]


@pytest.mark.parametrize(("task", "kind", "told"), BASES)
def test_a_type_of_text_leaves_the_base_its_class(task: str, kind: str, told: str, tmp_path: Path) -> None:
    base = build(task, kind)
    if kind == "qwen2_vl":  # its processor says what sizes pictures have
        shutil.copytree(base.config.name_or_path, tmp_path / "base")
    base.save_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=told))
    randomise(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    adapted = load_directories(tmp_path / "base", {"a": tmp_path / "adapter"})
    assert type(adapted.base) is type(base)
    found = dict(adapted.adapter("a").named_parameters())
    assert len(found) == sum("lora_" in name for name, _ in model.named_parameters())
    assert all(torch.isfinite(value).all() for value in found.values())


def test_a_type_that_the_base_has_a_class_for_chooses_it() -> None:
    told = {"architectures": ["MBartForConditionalGeneration"], "model_type": "mbart"}
    assert resolve_task(None, peft_task_type="CAUSAL_LM", config=told) == "text-generation"
    heard = {"architectures": ["Qwen2AudioForConditionalGeneration"], "model_type": "qwen2_audio"}
    assert resolve_task(None, peft_task_type="CAUSAL_LM", config=heard) == "text2text-generation"
    assert resolve_task(None, peft_task_type="SEQ_CLS", config=heard) == "text-classification"


_SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
_TINY = hf.BertConfig(vocab_size=20, **_SIZES)
WORDS = ["<unk>", "<pad>", "</s>", "one", "two", "three", "four", "red"]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}


def _decoder(directory: Path, **names: int) -> Path:
    torch.manual_seed(0)
    hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=len(WORDS), **SIZES, **names)).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("kind", [hf.LlamaForSequenceClassification, hf.LlamaModel])
def test_without_a_type_the_class_that_was_trained_is_loaded(kind: type[hf.PreTrainedModel], tmp_path: Path) -> None:
    """An adapter of a reward model was refused: it does not fit a model that writes texts."""
    base = _decoder(tmp_path / "base", pad_token_id=1)
    head = ["score"] if kind is hf.LlamaForSequenceClassification else None
    theirs = peft.get_peft_model(kind.from_pretrained(base), peft.LoraConfig(r=2, modules_to_save=head)).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    adapted = load_directories(base, {"a": tmp_path / "adapter"})
    assert type(adapted.base) is kind
    ids = torch.randint(len(WORDS), (2, 5))
    torch.testing.assert_close(adapted.eval()(ids)[0], theirs(ids)[0])


def test_a_class_of_none_of_the_tasks_is_the_one_that_the_config_names(tmp_path: Path) -> None:
    """The commands asked for a task, and none fits it."""
    model = hf.BertForNextSentencePrediction(_TINY)
    model.save_pretrained(tmp_path / "base")
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules="all-linear")).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    adapted = load_directories(tmp_path / "base", {"a": tmp_path / "adapter"})
    ids = torch.randint(20, (2, 5))
    torch.testing.assert_close(adapted.eval()(ids).logits, theirs(ids).logits)


def test_a_model_with_the_heads_of_its_pretraining_needs_a_task(tmp_path: Path) -> None:
    hf.BertForPreTraining(_TINY).save_pretrained(tmp_path / "base")
    with pytest.raises(PeftfxError, match="name the task"):
        load_directories(tmp_path / "base", {})
    assert type(load_directories(tmp_path / "base", {}, task="feature-extraction").base) is hf.BertModel


def test_a_classifier_has_the_padding_token_of_its_adapters_tokenizer(tmp_path: Path) -> None:
    """It was the base's, and a short text of a batch was read at its padding."""
    base = _decoder(tmp_path / "base", pad_token_id=1)
    model = hf.LlamaForSequenceClassification.from_pretrained(base, num_labels=3)
    tokenizer = word_tokenizer([*WORDS, "<new>"], unk_token="<unk>", pad_token="<new>")
    model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id  # as Trainer does
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, task_type="SEQ_CLS")).eval()
    randomise(theirs)
    for saved in (theirs, tokenizer):
        saved.save_pretrained(str(tmp_path / "adapter"))
    with pytest.warns(PeftfxWarning, match="pads texts with token 8, and the base's config names 1"):
        adapted = load_directories(base, {"a": tmp_path / "adapter"})
    texts = tokenizer(["one two red", "two"], padding=True, return_tensors="pt")
    rows = {name: texts[name] for name in ("input_ids", "attention_mask")}
    torch.testing.assert_close(adapted.eval()(**rows).logits, theirs(**rows).logits)
    alone = adapted(rows["input_ids"][1:, :1]).logits
    torch.testing.assert_close(adapted(**rows).logits[1:], alone, atol=1e-5, rtol=1e-5)


def test_a_class_that_does_no_named_task_is_the_one_that_was_trained(tmp_path: Path) -> None:
    """Its head is in the adapter, with more classes than the base's config tells."""
    build("feature-extraction", "wav2vec2").save_pretrained(tmp_path / "base")
    model = hf.Wav2Vec2ForAudioFrameClassification.from_pretrained(tmp_path / "base", num_labels=5)
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    adapted = load_directories(tmp_path / "base", {"a": tmp_path / "adapter"})
    assert type(adapted.base) is hf.Wav2Vec2ForAudioFrameClassification
    sound = torch.randn(2, 900)
    torch.testing.assert_close(adapted.eval()(sound).logits, theirs(sound).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["table-transformer", pytest.param("yolos", marks=pytest.mark.further)])
def test_a_detectors_head_has_one_class_more_than_labels(kind: str, tmp_path: Path) -> None:
    base = build("object-detection", kind)
    base.save_pretrained(tmp_path / "base")
    model = type(base).from_pretrained(tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True)
    options = {"target_modules": ["fc1", "query"], "modules_to_save": ["class_labels_classifier"]}
    theirs = peft.get_peft_model(model, peft.LoraConfig(r=2, **options)).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    adapted = load_directories(tmp_path / "base", {"a": tmp_path / "adapter"})
    assert adapted.base.config.num_labels == 5
    inputs = example_inputs(base)
    want = theirs(**inputs)
    assert want.logits.shape[-1] == 6
    torch.testing.assert_close(adapted.eval()(**inputs).logits, want.logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quantised", [False, True], ids=["", "quantised"])
def test_a_class_counts_as_the_one_that_the_config_names(quantised: bool, tmp_path: Path) -> None:
    config = hf.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, architectures=["BertModel"])
    if quantised:
        config.quantization_config = {"quant_method": "gptq", "bits": 4, "group_size": 8, "sym": True}
    config.save_pretrained(tmp_path)
    named = "BertForNextSentencePrediction"
    assert type(load_base(tmp_path, weights=False)).__name__ == "BertModel"
    assert type(load_base(tmp_path, weights=False, named=named)).__name__ == named
