"""`peftfx train` on bases of each kind: what a row teaches, which bases learn from it, and how a run ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.command import SIZES, Result, assert_refused
from support.words import word_tokenizer

from peftfx import runtime
from peftfx.training.rows import IGNORED, Padded, encoded, read_rows

Command = Callable[..., Result]
WORDS = ["<unk>", "<pad>", "</s>", "one", "two", "three", "four", "red", "blue", "is"]
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "bos_token_id": 2,
}
T5 = {"vocab_size": 10, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
CLASSES = [{"text": text, "label": label} for text, label in (("one is red", 0), ("two", 1), ("three is", 0))]
COMPLETIONS = [{"prompt": "one is", "completion": "red"}, {"prompt": "two", "completion": "blue red blue"}]


def save_tokenizer(root: Path, **names: str) -> hf.PreTrainedTokenizerFast:
    made = word_tokenizer(WORDS, unk_token="<unk>", eos_token="</s>", **names)
    made.save_pretrained(root)
    return made


def saved(root: Path, model: hf.PreTrainedModel, **names: str) -> Path:
    """A base with its tokenizer."""
    model.save_pretrained(root)
    save_tokenizer(root, **names)
    return root


def words(
    base: Path, rows: Sequence[dict[str, object]], output: Path, *more: object, steps: int = 2
) -> tuple[object, ...]:
    data = output.with_suffix(".jsonl")
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return ("train", "--base", base, "--data", data, "--output", output, "--steps", steps, *more)


@pytest.mark.parametrize(
    ("row", "ids", "ahead"),
    [({"prompt": "one is", "completion": "red"}, [3, 9, 7, 2], 2), ({"text": "two is blue"}, [4, 9, 8, 2], 0)],
    ids=["completion", "text"],
)
def test_a_decoder_learns_where_a_text_ends(row: dict[str, str], ids: list[int], ahead: int, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), encoding="utf-8")
    (made,) = encoded(read_rows(tmp_path / "rows.jsonl"), save_tokenizer(tmp_path), 8)
    assert made == {"input_ids": ids, "labels": [IGNORED] * ahead + ids[ahead:]}


@pytest.mark.parametrize("names", [{"pad_token": "<pad>"}, {}], ids=["its own", "the end of a text"])
def test_a_decoder_whose_config_names_no_padding_learns_classes(
    names: dict[str, str], peftfx: Command, tmp_path: Path
) -> None:
    """The tokenizer's padding is that of training, of the export, and of a batch that is served."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=len(WORDS), **LLAMA, eos_token_id=2)
    base, out = saved(tmp_path / "base", hf.LlamaForCausalLM(config), **names), tmp_path / "out"
    done = peftfx(*words(base, CLASSES, out, "--learning-rate", 0.1))
    assert done.code == 0, done.err
    exported = peftfx("export", "--base", base, "--adapter", out, "--output", tmp_path / "onnx", "--quiet")
    assert exported.code == 0, exported.err
    model = hf.LlamaForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=1 if names else 2)
    eager = peft.PeftModel.from_pretrained(model, out).eval()
    served = runtime.load(tmp_path / "onnx")
    texts = served.tokenizer(["one is red", "two"], padding=True, return_tensors="pt")
    rows = {name: texts[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(served(**rows).logits, eager(**rows).logits, atol=1e-5, rtol=1e-5)


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    def labels(*given: object) -> tuple[str, ...]:
        file = tmp_path / "rows.jsonl"
        file.write_text("\n".join(json.dumps({"text": "one", "label": label}) for label in given), encoding="utf-8")
        return read_rows(file).labels

    assert labels(10, 2, 0, 2) == ("0", "2", "10")
    assert labels(10, "2") == ("10", "2")
    assert labels("b", "a") == ("a", "b")


def test_an_encoder_decoder_reads_the_prompt_and_writes_the_completion(peftfx: Command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.T5Config(**T5, pad_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    base = saved(tmp_path / "base", hf.T5ForConditionalGeneration(config), pad_token="<pad>")
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, COMPLETIONS)), encoding="utf-8")
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    rows = encoded(read_rows(tmp_path / "rows.jsonl"), tokenizer, 3, sourced=True)
    assert rows == [{"input_ids": [3, 9], "labels": [7, 2]}, {"input_ids": [4], "labels": [8, 7, 8]}]
    batch = Padded(1)(rows)
    assert batch["input_ids"].tolist() == [[3, 9], [4, 1]]
    assert batch["labels"].tolist() == [[7, 2, IGNORED], [8, 7, 8]]
    done = peftfx(*words(base, COMPLETIONS * 4, tmp_path / "out", "--learning-rate", 0.05, "--json", steps=60))
    assert done.code == 0, done.err
    eager = peft.PeftModel.from_pretrained(hf.T5ForConditionalGeneration.from_pretrained(base), tmp_path / "out").eval()
    written = eager.generate(input_ids=torch.tensor([[3, 9]]), max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(written[0], skip_special_tokens=True) == "red"
    texts = [{"text": "one is red"}]
    assert_refused(peftfx(*words(base, texts, tmp_path / "not")), "rows of text do not tell what an encoder-decoder")


def test_bases_that_write_no_texts_are_refused_for_rows_of_texts(peftfx: Command, tmp_path: Path) -> None:
    config = hf.BertConfig(**SIZES)
    for kind, task in ((hf.BertForMaskedLM, "fill-mask"), (hf.BertModel, "feature-extraction")):
        base = saved(tmp_path / task, kind(config), pad_token="<pad>")
        refused = peftfx(*words(base, COMPLETIONS, tmp_path / "out"))
        assert_refused(refused, f"for a model that writes texts, and this one does {task}", "text and label")


def test_what_a_backbone_lacks_is_new_and_trained(peftfx: Command, tmp_path: Path) -> None:
    """A masked language model has no pooler, which a classifier reads."""
    torch.manual_seed(0)
    base = saved(tmp_path / "base", hf.BertForMaskedLM(hf.BertConfig(**SIZES)), pad_token="<pad>")
    done = peftfx(*words(base, CLASSES, tmp_path / "out"))
    assert done.code == 0, done.err
    assert "has no weights of bert.pooler.dense: they are new" in done.err
    told = json.loads((tmp_path / "out" / "adapter_config.json").read_text(encoding="utf-8"))
    assert sorted(told["modules_to_save"]) == ["bert.pooler.dense", "classifier"]
    export = ("export", "--base", base, "--adapter", tmp_path / "out", "--output", tmp_path / "onnx", "--quiet")
    assert peftfx(*export).code == 0


def test_rows_are_cut_where_positions_end(peftfx: Command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.GPT2Config(vocab_size=10, n_embd=32, n_layer=1, n_head=4, n_positions=8, eos_token_id=2)
    base = saved(tmp_path / "base", hf.GPT2LMHeadModel(config))
    done = peftfx(*words(base, [{"text": "one two three four " * 5}], tmp_path / "out"))
    assert done.code == 0, done.err
    assert "rows are cut to 8 tokens, the most that the model takes, and not to 512" in done.err


def test_a_training_that_diverges_writes_nothing(peftfx: Command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=len(WORDS), **LLAMA, eos_token_id=2)
    base = saved(tmp_path / "base", hf.LlamaForCausalLM(config))
    done = peftfx(*words(base, COMPLETIONS, tmp_path / "out", "--learning-rate", 1e30, steps=4))
    assert_refused(done, "the training diverged", "smaller --learning-rate")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("rows", "size"), [(2, 8), (3, 1)], ids=["at an epoch's end", "in an epoch"])
def test_a_run_at_its_end_goes_no_further(peftfx: Command, tmp_path: Path, rows: int, size: int) -> None:
    """transformers' Trainer takes one more step than it is asked for, if a checkpoint has them all."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=len(WORDS), **LLAMA, eos_token_id=2)
    base = saved(tmp_path / "base", hf.LlamaForCausalLM(config))
    given = (COMPLETIONS * 2)[:rows]
    line = words(base, given, tmp_path / "out", "--json", "--batch-size", size)
    first = json.loads(peftfx(*line, "--save-steps", 1).out)
    tensors = (tmp_path / "out" / "adapter_model.safetensors").read_bytes()
    again = json.loads(peftfx(*line, "--resume", "--force").out)
    assert (again["steps"], again["losses"], again["loss"]) == (2, first["losses"], first["loss"])
    assert (tmp_path / "out" / "adapter_model.safetensors").read_bytes() == tensors
    fewer = peftfx(*words(base, given, tmp_path / "out", "--resume", "--force", steps=1))
    assert "the checkpoint has 2 steps, and 1 are asked for" in fewer.err


def test_a_run_goes_on_with_the_adapter_of_its_checkpoint(peftfx: Command, tmp_path: Path) -> None:
    """All rows are one batch, so the next loss is the loss on the rows after the steps before."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=len(WORDS), **LLAMA, eos_token_id=2)
    base, out = saved(tmp_path / "base", hf.LlamaForCausalLM(config)), tmp_path / "out"
    more = ("--json", "--learning-rate", 0.1, "--save-steps", 1)
    first = json.loads(peftfx(*words(base, COMPLETIONS, out, "--evaluate", out.with_suffix(".jsonl"), *more)).out)
    again = json.loads(peftfx(*words(base, COMPLETIONS, out, "--resume", "--force", *more, steps=3)).out)
    assert again["losses"][:2] == first["losses"]
    assert again["losses"][2][1] == pytest.approx(first["evaluation"]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": 3}, "line 1 has text, which is no text: 3"),
        (
            {"messages": [{"role": "user", "content": "one"}]},
            "of which the last is not the assistant's, but has the role",
        ),
        ({"messages": [{"role": "user", "content": ["one"]}]}, "line 1 has messages, which is no chat"),
        ({"question": "one"}, "line 1 has question"),
    ],
)
def test_a_row_says_what_is_wrong_with_it(row: dict[str, object], said: str, peftfx: Command, tmp_path: Path) -> None:
    assert_refused(peftfx(*words(tmp_path / "base", [row], tmp_path / "out")), said)
