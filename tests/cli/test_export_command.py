"""The command line as a user types it: what it writes, and one clear message for each thing that can be wrong."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
import transformers as hf
from every_model.checks import build
from safetensors.torch import load_file
from support.adapted import randomise
from support.command import LABELS, Inputs, Result, assert_refused, typed

from peftfx import IA3, LoRA, PeftfxError, PromptTuning, transform
from peftfx.export import OnnxModel


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
        assert len(report["probes"]) >= 3
        assert all(c["max_abs"] < 1e-4 for c in report["comparisons"])
        assert report["bytes"]["model.onnx"] == (merged[0] / "model.onnx").stat().st_size
        assert set(report["seconds"]) == {"capture", "merge", "convert", "write", "verify"}
        assert set(report["memory"]) == (set(report["seconds"]) if sys.platform == "linux" else set())

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
        assert [p.name for p in sorted(adapter.iterdir())] == [*folders, "README.md", "peftfx_rules.json"]
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
        assert "what is there is not an earlier output" in refused.err
        assert "--force" not in refused.err  # it would be refused too
        assert [p.name for p in output.iterdir()] == ["old.txt"]
        refused = peftfx(*words, "--force")
        assert refused.code == 2
        assert "what is there is not an earlier output" in refused.err
        report = output / "peftfx_report.json"
        report.write_text("{}", encoding="utf-8")  # an export's, of whose files nothing is known
        assert_refused(peftfx(*words, "--force"), "would be lost: old.txt")
        report.write_text('{"files": ["old.txt", "peftfx_report.json"]}', encoding="utf-8")
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
        from peftfx.export.directories import load_directories

        adapted = load_directories(inputs.classifier, {"default": inputs.adapter})
        assert adapted(**text_inputs()).logits.shape == (3, LABELS)
        assert adapted.config.num_labels == LABELS


def test_a_base_without_its_processor_is_told_so_once(tmp_path: Path, peftfx: Callable[..., Result]) -> None:
    build("image-text-to-text", "qwen2_vl").save_pretrained(tmp_path / "base")
    words = ("export", "--base", tmp_path / "base", "--output", tmp_path / "out")
    assert_refused(peftfx(*words), "cannot capture this model", "copy the files of its processor")
    done = peftfx(*words, "--view", "decode")
    assert done.code == 0, done.err
    assert done.err.count("images are left out, and text alone is served") == 1


def test_in_python_the_files_of_the_source_are_beside_the_model(inputs: Inputs, tmp_path: Path) -> None:
    adapted = transform(hf.AutoModel.from_pretrained(inputs.encoder), LoRA(r=2, target="attention.query"))
    with pytest.raises(PeftfxError, match="no such directory"):
        adapted.export(tmp_path / "out", source=tmp_path / "nothing")
    adapted.export(tmp_path / "out", source=inputs.encoder)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (inputs.encoder / name).read_bytes()


def test_a_model_that_has_no_decode_view_needs_its_processor(tmp_path: Path, peftfx: Callable[..., Result]) -> None:
    build("fill-mask", "ultravbert").save_pretrained(tmp_path / "base")
    got = peftfx("export", "--base", tmp_path / "base", "--output", tmp_path / "out")
    assert_refused(got, "cannot capture this model", "copy the files of its processor")
    assert "--view decode" not in got.err
