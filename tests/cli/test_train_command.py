"""`peftfx train`: rows of each kind become an adapter that loads, in `peft` too; bad input is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.command import SIZES, Result, assert_refused
from support.words import word_tokenizer

from peftfx import PeftfxError
from peftfx.export.writing.atomic_directory import publish
from peftfx.serving.runs.asked import read_texts
from peftfx.training.rows import IGNORED, Padded, encoded, read_rows

Command = Callable[..., Result]
WORDS = ["<unk>", "<pad>", "</s>", "user", "assistant", "one", "two", "three", "four", "red", "blue", "is", ":"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} : {{ m.content }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA with a tokenizer of a few words, and a template."""
    root = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = hf.LlamaConfig(vocab_size=len(WORDS), **size, pad_token_id=1, bos_token_id=None, eos_token_id=2)
    hf.LlamaForCausalLM(config).save_pretrained(root)
    save_tokenizer(root)
    return root


def save_tokenizer(root: Path) -> hf.PreTrainedTokenizerFast:
    made = word_tokenizer(WORDS, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    made.chat_template = TEMPLATE
    made.save_pretrained(root)
    return made


def lines(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def completions(tmp_path: Path) -> Path:
    rows = [{"prompt": f"{n} is", "completion": color} for n in ("one", "two") for color in ("red",)]
    return lines(tmp_path / "rows.jsonl", rows * 4)  # type: ignore[arg-type]


def test_completions_are_learnt_and_the_adapter_is_pefts(
    base: Path, completions: Path, peftfx: Command, tmp_path: Path
) -> None:
    words = (
        "--base",
        base,
        "--data",
        completions,
        "--output",
        tmp_path / "out",
        "--rules",
        "lora(r=4)@all-linear | head",
    )
    done = peftfx("train", *words, "--epochs", 12, "--batch-size", 4, "--learning-rate", 0.05, "--json")
    told = json.loads(done.out)
    assert done.code == 0, done.err
    assert (told["kind"], told["rows"], told["steps"], len(told["losses"])) == ("completion", 8, 24, 24)
    assert told["losses"][-1][1] < 0.5 * told["losses"][0][1]
    assert "<polyline" in (tmp_path / "out" / "training" / "loss.svg").read_text(encoding="utf-8")
    eager = peft.PeftModel.from_pretrained(hf.LlamaForCausalLM.from_pretrained(base), tmp_path / "out").eval()
    ids = torch.tensor([[WORDS.index("one"), WORDS.index("is")]])
    assert int(eager(ids).logits[0, -1].argmax()) == WORDS.index("red")
    assert_refused(peftfx("train", *words), "exists already")


@pytest.mark.slow
def test_a_seed_decides_and_a_run_goes_on_where_it_was_stopped(
    base: Path, completions: Path, peftfx: Command, tmp_path: Path
) -> None:
    words = ("train", "--base", base, "--data", completions, "--batch-size", 4, "--save-steps", 2, "--quiet")
    whole, again, part = (tmp_path / name for name in ("whole", "again", "part"))
    assert peftfx(*words, "--output", whole, "--steps", 4).code == 0
    assert peftfx(*words, "--output", again, "--steps", 4).code == 0
    first, second = (load_file(path / "adapter_model.safetensors") for path in (whole, again))
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert peftfx(*words, "--output", part, "--steps", 2).code == 0
    assert peftfx(*words, "--output", part, "--steps", 4, "--resume", "--force").code == 0
    resumed = load_file(part / "adapter_model.safetensors")
    assert resumed.keys() == first.keys()
    assert json.loads((part / "training" / "losses.json").read_text(encoding="utf-8"))["steps"] == 4
    assert_refused(peftfx(*words, "--output", tmp_path / "none", "--resume"), "no checkpoint to go on from")


@pytest.mark.slow
def test_classes_are_learnt_with_a_new_head(peftfx: Command, tmp_path: Path) -> None:
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**SIZES)).save_pretrained(tmp_path / "bert")
    save_tokenizer(tmp_path / "bert")
    rows = [{"text": text, "label": label} for text, label in (("one red", "warm"), ("two blue", "cold"))]
    data = lines(tmp_path / "rows.jsonl", rows * 8)  # type: ignore[arg-type]
    words = ("train", "--base", tmp_path / "bert", "--data", data, "--output", tmp_path / "out", "--evaluate", data)
    done = peftfx(*words, "--epochs", 20, "--batch-size", 8, "--learning-rate", 0.02, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["evaluation"]["eval_loss"] < 0.3
    export = ("export", "--base", tmp_path / "bert", "--adapter", tmp_path / "out", "--output", tmp_path / "onnx")
    assert peftfx(*export, "--quiet").code == 0  # the adapter says its task
    (found,) = (json.loads(line) for line in peftfx("run", tmp_path / "onnx", "--text", "one red").out.splitlines())
    assert found[0]["label"] == "warm"  # and what its classes are called


def test_of_a_chat_the_last_message_counts(base: Path, tmp_path: Path) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    messages = [{"role": "user", "content": "one is"}, {"role": "assistant", "content": "red"}]
    rows = read_rows(lines(tmp_path / "rows.jsonl", [{"messages": messages}]))
    (row,) = encoded(rows, tokenizer, 64)
    said = [WORDS[i] for i in row["input_ids"]]
    assert said == ["user", ":", "one", "is", "</s>", "assistant", ":", "red", "</s>"]
    assert [i for i, label in enumerate(row["labels"]) if label != IGNORED] == [7, 8]
    batch = Padded(1)([row, {"input_ids": [3], "labels": [3]}])
    assert batch["attention_mask"].sum(1).tolist() == [9, 1]
    assert batch["labels"][1].tolist() == [3] + [IGNORED] * 8


def test_no_run_goes_on_by_other_rules(base: Path, completions: Path, peftfx: Command, tmp_path: Path) -> None:
    words = ("train", "--base", base, "--data", completions, "--batch-size", 4, "--save-steps", 1, "--output")
    words = (*words, tmp_path / "out", "--quiet", "--steps")
    assert peftfx(*words, 1, "--rules", "lora(r=2)@attention").code == 0
    again = (*words, 2, "--resume", "--force", "--rules")
    for rules in ("lora(r=4)@mlp", "lora(r=2, lora_alpha=3)@attention", "lora(r=2)@attention; ia3@mlp"):
        assert_refused(peftfx(*again, rules), "trained by the rules lora(r=2)@attention", "the same --rules")
    (kept,) = (tmp_path / "out-checkpoints").glob("*/rules.txt")
    kept.unlink()  # as in a checkpoint of an older version
    assert_refused(peftfx(*again, "lora(r=4)@mlp"), "other tensors than an adapter by the rules lora(r=4)@mlp")
    done = peftfx(*again, "lora( r=2 ) @ attention")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out" / "training" / "losses.json").read_text(encoding="utf-8"))["steps"] == 2


def test_a_chat_template_that_raises_is_told(base: Path, tmp_path: Path) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(base)
    messages = [{"role": role, "content": "red"} for role in ("user", "assistant")]
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    rows = read_rows(lines(tmp_path / "rows.jsonl", [{"messages": messages}]))
    with pytest.raises(PeftfxError, match="roles must alternate") as caught:
        encoded(rows, tokenizer, 64)
    assert caught.value.where.endswith("row 1")


def test_a_mark_of_unicode_before_the_first_line_is_no_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('\ufeff{"text": "one"}\n', encoding="utf-8")
    assert [row["text"] for row in read_rows(file).items] == ["one"]
    file.write_text("\ufeffone\ntwo\n", encoding="utf-8")
    assert read_texts(file) == ("one", "two")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_end_where_json_lines_do(end: str, tmp_path: Path) -> None:
    texts = [f"one{mark}two" for mark in ("\u2028", "\u2029", "\x85", " ")]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(end.join(json.dumps({"text": text}, ensure_ascii=False) for text in (*texts, "")).encode())
    assert [row["text"] for row in read_rows(file).items] == [*texts, ""]
    file.write_bytes((end.join(texts) + end).encode())
    assert read_texts(file) == tuple(texts)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no rows"),
        ("{", "line 1 is no JSON"),
        ("[]", "line 1 has"),
        ('{"question": "x"}', "line 1 has question"),
        ('{"text": 3}', "line 1 has text"),
        (
            '{"text": "one"}\n{"prompt": "one", "completion": "two"}',
            "line 1 is of kind text, line 2",
        ),
        ('{"messages": []}', "line 1 has messages"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "line 1 has messages"),
        (
            '{"text": "one", "label": 1}\n{"text": "two", "label": 0.5}',
            "line 2 has the label 0.5",
        ),
        ('{"text": "one", "label": ["x"]}', "line 1 has the label ['x']"),
        ('{"text": "one", "label": null}', "line 1 has the label None"),
        ('{"prompt": "one", "completion": "two", "x": "\\ud800"}\n' + '{"prompt": 1}', "line 2 has prompt"),
    ],
)
def test_bad_rows_are_told(text: str, said: str, base: Path, peftfx: Command, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(text, encoding="utf-8")
    words = ("train", "--base", base, "--data", tmp_path / "rows.jsonl", "--output", tmp_path / "out")
    assert_refused(peftfx(*words), said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_bad_options_are_told(base: Path, completions: Path, peftfx: Command, tmp_path: Path) -> None:
    words = ("train", "--base", base, "--data", completions, "--output", tmp_path / "out")
    assert_refused(peftfx(*words, "--batch-size", 0), "batch_size cannot be 0")
    assert_refused(peftfx(*words, "--epochs", "nan"), "epochs cannot be nan")
    for seed in (-1, 2**32, 10**20 - 1):
        assert_refused(peftfx(*words, "--seed", seed), f"seed cannot be {seed}", "from 0 to 4294967295")
    assert_refused(peftfx(*words, "--rules", "lorra"), "lorra")
    assert_refused(peftfx(*words, "--max-length", 2), "nothing to learn from")
    other = ("train", "--base", base, "--data", tmp_path / "no", "--output", tmp_path)
    assert_refused(peftfx(*other), "not an earlier output")
    assert_refused(peftfx("train", "--base", tmp_path / "no", *words[3:]), "no such directory")


def test_of_two_runs_to_one_place_the_second_is_refused_at_once(
    base: Path, completions: Path, peftfx: Command, tmp_path: Path
) -> None:
    words = ("train", "--base", base, "--data", completions, "--output", tmp_path / "out", "--save-steps", 1)
    with publish(tmp_path / "out") as made:
        assert_refused(peftfx(*words), "another run is writing there")
        (made / "one").write_text("")
    assert not (tmp_path / "out-checkpoints").exists()


@pytest.mark.parametrize("kept", ["checkpoint-2/trainer_state.json", "other/adapter_config.json"])
def test_an_adapter_beside_checkpoints_or_others_is_not_replaced(
    kept: str, base: Path, completions: Path, peftfx: Command, tmp_path: Path
) -> None:
    words = ("train", "--base", base, "--data", completions, "--steps", 1, "--output", tmp_path / "out", "--force")
    rules = ("--rules", "lora(r=2)@attention; ia3@mlp")
    assert peftfx(*words, *rules).code == 0
    assert peftfx(*words, "--rules", "lora(r=2)@mlp").code == 0  # what a run has written is replaced
    (notes := tmp_path / "out" / "notes.md").write_text("mine")
    assert_refused(peftfx(*words), "would be lost: notes.md")
    notes.unlink()
    file = tmp_path / "out" / kept
    file.parent.mkdir()
    file.write_text("{}")
    assert_refused(peftfx(*words), "not an earlier output")
    assert file.exists()
