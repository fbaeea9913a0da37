"""The command line as a user types it: what it writes, and one clear message for each thing that can be wrong."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import peft
import pytest
import tokenizers
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from support.command import Result, assert_refused, typed
from support.parity import randomise
from support.zoo import TOKENS
from torch import nn

from peftfx import IA3, LoRA, PromptTuning, transform
from peftfx.export import OnnxModel
from peftfx.export.deployment import deployment

SIZES = {
    **TOKENS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
LABELS = 5


@dataclass(frozen=True)
class Inputs:
    """Directories of models and adapters; tests that damage one damage a copy.

    Attributes:
        encoder: BERT without a head, with a tokenizer.
        classifier: BERT with a head of three labels.
        adapter: LoRA and a head of `LABELS` labels, trained on the encoder by `peft`.
        lora: LoRA alone, for the classifier.
        eager: the encoder with the adapter in `peft`.
    """

    encoder: Path
    classifier: Path
    adapter: Path
    lora: Path
    eager: nn.Module


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    root = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    hf.BertModel(hf.BertConfig(**SIZES)).save_pretrained(root / "encoder")
    words = tokenizers.models.WordLevel({"[UNK]": 0, "[PAD]": 1, "merge": 2}, unk_token="[UNK]")
    fast = hf.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="[UNK]", pad_token="[PAD]"
    )
    fast.save_pretrained(root / "encoder")
    (root / "encoder" / "preprocessor_config.json").write_text('{"size": 3}', encoding="utf-8")
    (root / "encoder" / "README.md").write_text("# A model", encoding="utf-8")
    hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=3)).save_pretrained(root / "classifier")
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["query", "value"]}
    model = hf.BertForSequenceClassification.from_pretrained(root / "encoder", num_labels=LABELS)
    eager = peft.get_peft_model(model, peft.LoraConfig(**options, task_type="SEQ_CLS"))
    randomise(eager)
    eager.save_pretrained(str(root / "adapter"))
    lora = peft.get_peft_model(
        hf.BertForSequenceClassification.from_pretrained(root / "classifier"), peft.LoraConfig(**options)
    )
    randomise(lora)
    lora.save_pretrained(str(root / "lora"))
    return Inputs(root / "encoder", root / "classifier", root / "adapter", root / "lora", eager.eval())


def text_inputs(batch: int = 3, length: int = 9) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(batch)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, 5:] = 0
    ids = torch.randint(4, 99, (batch, length), generator=random)
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}


def initializers(directory: Path) -> Mapping[str, ir.Value]:
    return ir.load(directory / "model.onnx").graph.initializers


class TestExport:
    """A base and an adapter become one directory."""

    @pytest.fixture(scope="class")
    @staticmethod
    def merged(inputs: Inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
        output = tmp_path_factory.mktemp("merged") / "out"
        return output, typed("export", "--base", inputs.encoder, "--adapter", inputs.adapter, "--output", output)

    def test_it_succeeds_and_says_what_it_does(self, merged: tuple[Path, Result]) -> None:
        output, result = merged
        assert result.code == 0, result.err
        stages = [line.partition("] ")[2] for line in result.err.splitlines()]
        assert stages == ["load", "capture", "merge", "convert", "write", "verify"]
        assert re.search(r"adapter\W+LoRA \([\d,]+ parameters\)", result.out)
        assert "ONNX Runtime = torch" in result.out
        assert [p.name for p in output.parent.iterdir()] == ["out"]

    def test_onnx_runtime_computes_what_peft_does(self, merged: tuple[Path, Result], inputs: Inputs) -> None:
        feed = text_inputs()
        with torch.no_grad():
            want = inputs.eager(**feed).logits
        assert want.shape[1] == LABELS
        torch.testing.assert_close(OnnxModel(merged[0])(**feed)["logits"], want, rtol=0, atol=1e-4)

    def test_a_merged_model_has_no_low_rank_factors(self, merged: tuple[Path, Result]) -> None:
        names = set(initializers(merged[0]))
        assert not [n for n in names if "lora" in n or n.startswith("adapters.")]
        assert {"classifier.weight", "classifier.bias"} <= set(names)  # the head that the adapter trained
        assert "bert.encoder.layer.1.attention.self.key.bias" in names

    def test_the_files_a_server_needs_are_beside_it(self, merged: tuple[Path, Result], inputs: Inputs) -> None:
        output = merged[0]
        names = {p.name for p in output.iterdir()}
        assert {
            "model.onnx",
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "preprocessor_config.json",
        } < names
        assert not [n for n in names if n.startswith((".", "README", "adapter")) or n.endswith(".safetensors")]
        assert (output / "tokenizer.json").read_bytes() == (inputs.encoder / "tokenizer.json").read_bytes()
        config = hf.AutoConfig.from_pretrained(output)
        assert config.num_labels == LABELS
        assert hf.AutoTokenizer.from_pretrained(output)("merge")["input_ids"] == [2]

    def test_the_report_can_be_read_by_a_machine(self, merged: tuple[Path, Result]) -> None:
        report = json.loads((merged[0] / "peftfx_report.json").read_text(encoding="utf-8"))
        assert report["model"] == "BertForSequenceClassification"
        assert report["inputs"]["input_ids"] == ["batch", "sequence"]
        assert report["outputs"] == ["logits"]
        sites = [f"bert.encoder.layer.{i}.attention.self.{name}" for i in (0, 1) for name in ("query", "value")]
        assert report["merged"] == sorted([*sites, "classifier"])  # and the head that was trained with them
        assert len({json.dumps(c["shapes"]) for c in report["comparisons"]}) >= 3
        assert all(c["max_abs"] < 1e-4 for c in report["comparisons"])
        assert report["bytes"]["model.onnx"] == (merged[0] / "model.onnx").stat().st_size
        assert set(report["seconds"]) == {"capture", "merge", "convert", "write", "verify"}

    def test_without_merge_the_adapter_is_apart_under_its_own_names(
        self, inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path
    ) -> None:
        output = tmp_path / "made" / "for" / "it"
        done = peftfx("export", "--base", inputs.encoder, "--adapter", inputs.adapter, "--no-merge", "--output", output)
        assert done.code == 0, done.err
        saved = load_file(inputs.adapter / "adapter_model.safetensors")
        found = {n: v for n, v in initializers(output).items() if n.startswith("adapters.default.")}
        place = "bert.encoder.layer.0.attention.self.query"
        for x in "AB":
            value = torch.from_numpy(found[f"adapters.default.{place}.lora_{x}"].const_value.numpy())
            want = saved[f"base_model.model.{place}.lora_{x}.weight"]
            assert torch.equal(value, want) or torch.equal(value, want.T)
        assert len(found) == len(saved)
        feed = text_inputs(2, 6)
        with torch.no_grad():
            torch.testing.assert_close(
                OnnxModel(output)(**feed)["logits"], inputs.eager(**feed).logits, rtol=0, atol=1e-4
            )

    def test_an_adapter_of_several_rules_is_served_whole(
        self, inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path
    ) -> None:
        base, adapter, output = inputs.encoder, tmp_path / "mixed", tmp_path / "out"
        model = hf.BertForSequenceClassification.from_pretrained(base, num_labels=LABELS)
        lora = LoRA(r=4, lora_alpha=6, target="attention.query", modules_to_save=["classifier"])
        adapted = transform(model, [lora, IA3(target="mlp.down"), PromptTuning(num_virtual_tokens=3)])
        randomise(adapted)
        adapted.save_pretrained(adapter)
        folders = ["1-lora", "2-ia3", "3-prompt_tuning"]
        assert [p.name for p in sorted(adapter.iterdir())] == [*folders, "peftfx_rules.json"]
        words = ("export", "--base", base, "--adapter", adapter, "--task", "text-classification", "--output", output)
        done = peftfx(*words)
        assert done.code == 0, done.err
        assert all(name in done.out for name in ("LoRA", "IA3", "PromptTuning"))
        assert not [n for n in initializers(output) if n.startswith("adapters.")]
        assert not (output / "peftfx_rules.json").exists()
        served = OnnxModel(output)
        for batch, length in ((3, 9), (1, 1)):
            feed = text_inputs(batch, length)
            with torch.no_grad():
                want = adapted.eval()(**feed).logits
            assert want.shape == (batch, LABELS)
            torch.testing.assert_close(served(**feed)["logits"], want, rtol=0, atol=1e-4)
        shutil.rmtree(adapter / folders[1])
        assert_refused(peftfx(*words, "--force"), "no such directory", folders[1])
        assert OnnxModel(output)(**feed)["logits"].shape == (1, LABELS)

    def test_a_base_alone_for_another_task_and_opset_replaces_what_was_there(
        self, inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path
    ) -> None:
        output = tmp_path / "out"
        output.mkdir()
        (output / "old.txt").write_text("old", encoding="utf-8")
        words = (
            "export",
            "--base",
            inputs.classifier,
            "--task",
            "feature-extraction",
            "--opset",
            21,
            "--output",
            output,
        )
        refused = peftfx(*words)
        assert refused.code == 2
        assert "exists already" in refused.err
        assert "--force" in refused.err
        assert [p.name for p in output.iterdir()] == ["old.txt"]
        # The classifier has a pooler, and a head that this task does not need.
        done = peftfx(*words, "--force")
        assert done.code == 0, done.err
        assert not (output / "old.txt").exists()
        assert ir.load(output / "model.onnx").opset_imports[""] == 21
        assert "last_hidden_state" in OnnxModel(output)(**text_inputs())

    def test_a_head_that_nobody_has_is_refused(
        self, inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path
    ) -> None:
        words = ("export", "--base", inputs.encoder, "--task", "text-classification", "--output", tmp_path / "out")
        for adapter in ((), ("--adapter", inputs.lora)):
            done = peftfx(*words, *adapter)
            assert_refused(done, "classifier.bias, classifier.weight", "BertForSequenceClassification")
        assert list(tmp_path.iterdir()) == []

    def test_the_head_of_an_adapter_stands_over_the_bases_own(self, inputs: Inputs) -> None:
        from peftfx.export.command import load_directories

        adapted = load_directories(inputs.classifier, {"default": inputs.adapter})
        assert adapted(**text_inputs()).logits.shape == (3, LABELS)
        assert adapted.config.num_labels == LABELS


class TestInspect:
    """The table of the places where adapters can act."""

    def test_a_config_is_enough(self, inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path) -> None:
        shutil.copy(inputs.classifier / "config.json", tmp_path)
        done = peftfx("inspect", tmp_path, "--json")
        assert done.code == 0, done.err
        sites = json.loads(done.out)
        roles = {site["path"]: site["role"] for site in sites}
        assert roles["bert.encoder.layer.1.attention.self.query"] == "attention.query"
        assert roles["classifier"] == "head"

    def test_the_table_shows_what_a_target_picks(self, inputs: Inputs, peftfx: Callable[..., Result]) -> None:
        done = peftfx("inspect", inputs.encoder, "--target", "attention.query")
        assert done.code == 0, done.err
        assert "path" in done.out.splitlines()[1]
        assert done.out.count("attention.self.query") == done.out.count("attention.query") == 2
        assert "self.value" not in done.out

    def test_what_matches_nothing_names_the_nearest(self, inputs: Inputs, peftfx: Callable[..., Result]) -> None:
        done = peftfx("inspect", inputs.encoder, "--target", "attention.kwery")
        assert_refused(done, "attention.kwery", "did you mean", "'attention.query'")

    def test_rules_are_planned_without_weights(
        self, inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path
    ) -> None:
        shutil.copy(inputs.classifier / "config.json", tmp_path)
        rules = "lora(r=4, modules_to_save=['classifier'])@attention.query; ia3@mlp.down"
        done = peftfx("inspect", tmp_path, "--rules", rules)
        assert done.code == 0, done.err
        assert "attention.query  2 sites, 512 parameters" in done.out
        assert "the target does not match its path or role" in done.out
        plan = json.loads(peftfx("inspect", tmp_path, "--rules", rules, "--json").out)
        assert plan["rules"][0]["skipped"]["it is in modules_to_save"] == ["classifier"]
        assert plan["rules"][1]["touched"] == {"mlp.down": {"places": 2, "parameters": 96}}
        assert plan["parameters"] == sum(rule["parameters"] for rule in plan["rules"])

    def test_rules_that_cannot_be_followed(self, inputs: Inputs, peftfx: Callable[..., Result]) -> None:
        inspect = lambda rules, *more: peftfx("inspect", inputs.encoder, "--rules", rules, *more)  # noqa: E731
        assert_refused(inspect("lorra"), "unknown method 'lorra'", "did you mean 'lora'")
        assert_refused(inspect("lora(rr=8)"), "no option 'rr'", "did you mean 'r'")
        assert_refused(inspect("lora@atention.query"), "matches no site", "'attention.query'")
        assert_refused(inspect("lora", "--target", "mlp"), "put the target into the rule")

    def test_a_missing_directory(self, peftfx: Callable[..., Result], tmp_path: Path) -> None:
        assert_refused(peftfx("inspect", tmp_path / "nowhere"), "no such directory", "nowhere")


class TestMethods:
    """`peftfx methods`: what a rule can say, read from the methods' own files."""

    def test_each_method_is_listed_and_each_of_its_options(self, peftfx: Callable[..., Result]) -> None:
        from peftfx.methods import methods

        listed = peftfx("methods").out
        for peft_type, cls in methods().items():
            assert f"{peft_type.lower()} " in listed
            (found,) = json.loads(peftfx("methods", peft_type.lower(), "--json").out)
            assert all(option["text"] for option in found["options"]), peft_type
            assert {option["name"] for option in found["options"]} <= set(cls.options())

    def test_one_method_in_words(self, peftfx: Callable[..., Result]) -> None:
        done = peftfx("methods", "LoRA")
        assert "r=8  (int) rank." in done.out
        assert_refused(peftfx("methods", "lorra"), "did you mean 'lora'")


Damage = Callable[[Path, Path], None]


def cut(path: Path) -> None:
    """Truncate a file, as an interrupted download does."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def change(adapter: Path, **options: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **options}), encoding="utf-8")


def pickle(directory: Path, name: str) -> None:
    """Only a pickle: it must never be opened."""
    for path in directory.glob("*.safetensors"):
        path.unlink()
    (directory / name).write_bytes(b"\x80\x04not to be read")


def of_another_model(adapter: Path) -> None:
    """A layer that this model does not have, one that is lacking, one of another size."""
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    moved = {name.replace("layer.1.", "layer.9."): tensor for name, tensor in tensors.items()}
    first = next(name for name in moved if "layer.0" in name and "lora_A" in name)
    moved[first] = torch.zeros(4, 48)
    save_file(moved, path)


DAMAGES: Mapping[str, tuple[Damage, tuple[str, ...]]] = {
    "missing base": (lambda b, a: shutil.rmtree(b), ("no such directory", "base", "hint: ")),
    "missing adapter": (lambda b, a: shutil.rmtree(a), ("no such directory", "adapter", "adapter_config.json")),
    "base without config": (lambda b, a: (b / "config.json").unlink(), ("no config.json", "base")),
    "corrupt base config": (lambda b, a: cut(b / "config.json"), ("not valid JSON", "config.json")),
    "base config is a list": (lambda b, a: (b / "config.json").write_text("[]"), ("not a JSON object", "config.json")),
    "unknown model type": (
        lambda b, a: (b / "config.json").write_text('{"model_type": "brt"}'),
        ("no model type 'brt'", "did you mean 'bert'"),
    ),
    "truncated base": (lambda b, a: cut(b / "model.safetensors"), ("broken safetensors", "model.safetensors")),
    "base without weights": (lambda b, a: (b / "model.safetensors").unlink(), ("no weights", "model.safetensors")),
    "pickled base": (lambda b, a: pickle(b, "pytorch_model.bin"), ("pickle is never loaded", "pytorch_model.bin")),
    "adapter without config": (lambda b, a: (a / "adapter_config.json").unlink(), ("no adapter_config.json",)),
    "corrupt adapter config": (lambda b, a: cut(a / "adapter_config.json"), ("JSON", "adapter_config.json")),
    "adapter config without type": (
        lambda b, a: (a / "adapter_config.json").write_text("{}"),
        ("names no peft_type", "adapter_config.json"),
    ),
    "truncated adapter": (lambda b, a: cut(a / "adapter_model.safetensors"), ("safetensors", "truncated or damaged")),
    "empty adapter": (
        lambda b, a: (a / "adapter_model.safetensors").write_bytes(b""),
        ("cannot be read as safetensors",),
    ),
    "pickled adapter": (lambda b, a: pickle(a, "adapter_model.bin"), ("does not unpickle", "adapter_model.bin")),
    "adapter of another model": (
        lambda b, a: of_another_model(a),
        (
            "1 of another shape",
            "[4, 48] in the file, [4, 32] in this model",
            "2 missing",
            "layer.1",
            "4 unexpected",
            "layer.9",
        ),
    ),
    "unknown method": (lambda b, a: change(a, peft_type="LORRA"), ("LORRA", "LORA")),
    "unsupported option": (
        lambda b, a: change(a, use_qalora=True),
        ("does not support use_qalora=True", "adapter_config.json"),
    ),
    "impossible option": (lambda b, a: change(a, r=0), ("rank must be 1 or more",)),
    "wrong type of option": (lambda b, a: change(a, r="eight"), ("r", "eight")),
    "unknown task of the adapter": (
        lambda b, a: change(a, task_type="SEQ_CLASS"),
        ("task type 'SEQ_CLASS'", "'SEQ_CLS'"),
    ),
    "no such module to save": (
        lambda b, a: change(a, modules_to_save=["clasifier"]),
        ("clasifier", "did you mean 'classifier'"),
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_bad_input_is_one_message(name: str, inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path) -> None:
    base, adapter, output = tmp_path / "base", tmp_path / "adapter", tmp_path / "there" / "out"
    shutil.copytree(inputs.classifier, base)
    shutil.copytree(inputs.lora, adapter)
    damage, texts = DAMAGES[name]
    damage(base, adapter)
    before = {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")}
    assert_refused(peftfx("export", "--base", base, "--adapter", adapter, "--output", output), *texts)
    assert {p: p.is_file() and p.read_bytes() for p in tmp_path.rglob("*")} == before


def test_a_target_that_matches_nothing(inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(inputs.lora, adapter)
    change(adapter, target_modules=["querry"])
    path = adapter / "adapter_model.safetensors"
    save_file({name.replace(".query.", ".querry."): t for name, t in load_file(path).items()}, path)
    done = peftfx("export", "--base", inputs.classifier, "--adapter", adapter, "--output", tmp_path / "out")
    assert_refused(done, "unexpected", "querry", "did you mean", "query")
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("where", ["base", "adapter", "above"])
def test_an_output_over_an_input(where: str, inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path) -> None:
    base, adapter = tmp_path / "in" / "base", tmp_path / "in" / "adapter"
    shutil.copytree(inputs.classifier, base)
    shutil.copytree(inputs.lora, adapter)
    output = {"base": base, "adapter": adapter, "above": tmp_path / "in"}[where]
    before = sorted(tmp_path.rglob("*"))
    done = peftfx("export", "--base", base, "--adapter", adapter, "--output", output, "--force")
    assert_refused(done, "would replace an input")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "texts"),
    [
        (("--task", "text-clasification"), ("unknown task", "did you mean 'text-classification'")),
        (("--task", "text-to-image"), ("does not do text-to-image", "text-classification")),
        (("--opset", "3"), ("opset 3", "18")),
        (("--opset", "999"), ("opset 999", "18")),
        (("--optimize", "tpu"), ("'tpu'", "one of cpu, cuda, none")),
        (("--dtype", "fp8"), ("unknown dtype", "fp16")),
        (("--max-memory", "much"), ("not a size", "4GB")),
        (("--max-memory", "900MB"), ("are needed", "1.1 GB")),
    ],
    ids=str,
)
def test_options_that_make_no_sense(
    words: tuple[str, ...], texts: tuple[str, ...], inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path
) -> None:
    assert_refused(peftfx("export", "--base", inputs.classifier, "--output", tmp_path / "out", *words), *texts)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words", [("export",), ("export", "--bse", "x"), ("exprt",), ("export", "--opset", "new")], ids=str
)
def test_a_line_that_cannot_be_read_shows_the_usage(words: tuple[str, ...], peftfx: Callable[..., Result]) -> None:
    done = peftfx(*words)
    assert done.code == 2
    assert "Usage: " in done.err
    assert "Traceback" not in done.err


def test_in_a_process_of_its_own_an_error_is_no_traceback(tmp_path: Path) -> None:
    done = typed("export", "--base", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert_refused(done, "no such directory", str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_verification_is_exit_code_1_and_leaves_nothing(
    inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference = deployment.reference_of
    monkeypatch.setattr(
        deployment, "reference_of", lambda graph: lambda feed: {n: v + 0.01 for n, v in reference(graph)(feed).items()}
    )
    done = peftfx("export", "--base", inputs.classifier, "--output", tmp_path / "out")
    assert_refused(done, "ONNX Runtime disagrees", "logits", "tolerance", code=1)
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_may_not_be_written(inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    if os.access(closed, os.W_OK):
        pytest.skip("this user may write anywhere")
    done = peftfx("export", "--base", inputs.classifier, "--output", closed / "out")
    assert_refused(done, "cannot write", "may write to")


def test_an_output_below_a_file(inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    done = peftfx("export", "--base", inputs.classifier, "--output", tmp_path / "file" / "out")
    assert_refused(done, "file")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


FULL = 'mount -t tmpfs -o size=SIZE none "$1" && shift && "$@"; code=$?; ls -A "$DISK"; exit $code'


@pytest.mark.slow
@pytest.mark.parametrize("size", ["64k", "weights and no more"])
def test_a_full_disk(size: str, inputs: Inputs, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    weights = (inputs.classifier / "model.safetensors").stat().st_size
    script = FULL.replace("SIZE", "64k" if size == "64k" else f"{weights // 1024 + 16}k")
    if subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", disk, "true"], capture_output=True, check=False
    ).returncode:
        pytest.skip("no small disk can be mounted here")
    words = ["export", "--base", inputs.classifier, "--output", disk / "out"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", disk, sys.executable, "-m", "peftfx", *map(str, words)],
        capture_output=True, text=True, check=False, env={**os.environ, "DISK": str(disk)},
    )  # fmt: skip
    assert_refused(
        Result(done.returncode, done.stdout, done.stderr), "free", "are needed" if size == "64k" else "No space left"
    )
