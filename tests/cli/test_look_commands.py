"""Commands that look: info, diff, export --dry-run; and how every command speaks: --json, --quiet, -v, names."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
import transformers as hf
import typer
from safetensors.torch import load_file, save_file
from support.command import Inputs, Result, assert_refused

from peftfx.cli.main import app
from peftfx.serving.adapter_file import write_adapter_file

Command = Callable[..., Result]


def test_every_command_takes_the_options_of_its_voice() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert {"as_json", "quiet", "verbose"} <= set(inspect.signature(command.callback).parameters)


def test_choices_are_in_the_help_and_are_completed() -> None:
    command = typer.main.get_command(app).commands["export"]  # type: ignore[attr-defined]
    options = {option.name: option for option in command.params}
    assert options["view"].metavar == "forward|decode|auto"
    with click.Context(command) as context:
        for name, begun, words in (("view", "d", ["decode"]), ("engine", "", ["fast", "torch"]), ("dtype", "x", [])):
            assert [item.value for item in options[name].shell_complete(context, begun)] == words
        assert "text-generation" in [item.value for item in options["task"].shell_complete(context, "text")]


def test_info_tells_what_there_is(inputs: Inputs, peftfx: Command, tmp_path: Path) -> None:
    done = peftfx("info", inputs.lora, "--json")
    told = json.loads(done.out)
    assert (done.code, told["kind"], told["facts"]["tensors"]) == (0, "adapter", 8)
    assert told["facts"]["parameters"] == sum(
        t.numel() for t in load_file(inputs.lora / "adapter_model.safetensors").values()
    )
    assert told["facts"]["rules"][0].startswith("lora(")
    assert "BertModel" in peftfx("info", inputs.encoder).out
    assert peftfx("info", inputs.lora, "--quiet").out == ""
    assert_refused(peftfx("info", tmp_path / "nothing"), "there is no such directory")
    assert_refused(peftfx("info", tmp_path), "no config.json")
    shutil.copytree(inputs.lora, tmp_path / "unet")
    assert_refused(peftfx("info", tmp_path), "no config.json", "adapters below it: unet")
    (tmp_path / "training_args.bin").touch()
    assert_refused(peftfx("info", tmp_path), "this is what Trainer saves", "trainer.model.save_pretrained")


def test_info_of_a_file_tells_what_to_give(inputs: Inputs, peftfx: Command, tmp_path: Path) -> None:
    file = inputs.lora / "adapter_model.safetensors"
    assert_refused(peftfx("info", file), "this is a file of tensors", f"give its folder: {inputs.lora}")
    for name, told in (("model.onnx", "a graph"), ("model.onnx.data", "the weights of a graph"), ("a.txt", "a file")):
        (tmp_path / name).write_bytes(b"x")
        assert_refused(peftfx("info", tmp_path / name), f"this is {told}, and info takes a directory", str(tmp_path))


def test_info_of_adapter_files_tells_the_files_of_all_graphs(peftfx: Command, tmp_path: Path) -> None:
    path = tmp_path / "low.onnx_adapter"
    path.mkdir()
    assert_refused(peftfx("info", path), "no file for a graph")
    for number, graph in enumerate(("encoder_model", "decoder_model"), 1):
        write_adapter_file({"q.lora_A": torch.ones(number, 4)}, 0xABC, path / f"{graph}.onnx_adapter")
    told = json.loads(peftfx("info", path, "--json").out)
    shapes = {"encoder_model.q.lora_A": "1x4", "decoder_model.q.lora_A": "2x4"}
    size = sum(file.stat().st_size for file in path.iterdir())
    assert told["kind"] == "slots"
    assert told["facts"] == {"base": "00000abc", "tensors": 2, "bytes": size, "shapes": shapes}


def test_a_merged_model_is_a_base_and_not_an_export(inputs: Inputs, peftfx: Command, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert peftfx("merge", "--base", inputs.classifier, "--adapter", inputs.lora, "--output", merged, "-q").code == 0
    told = json.loads(peftfx("info", merged, "--json").out)
    assert (told["kind"], told["facts"]["architectures"]) == ("base", ["BertForSequenceClassification"])
    assert (told["facts"]["merged"], list(told["facts"]["files"])) == (["LoRA"], ["model.safetensors"])
    for words in (("diff", merged, merged), ("report", merged, "--html", tmp_path / "page.html")):
        assert_refused(peftfx(*words), "this is a merged model, and not an export", str(merged))
    report = merged / "peftfx_report.json"
    report.write_text(json.dumps({**json.loads(report.read_text(encoding="utf-8")), "methods": 3}), encoding="utf-8")
    assert_refused(peftfx("info", merged), "not the report of a merge", str(report), "merge the model again")


def test_tied_weights_count_once(peftfx: Command, tmp_path: Path) -> None:
    size = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**size))
    model.save_pretrained(tmp_path / "base")
    count = sum(p.numel() for p in model.parameters())
    words = ("export", "--base", tmp_path / "base", "--output", tmp_path / "out", "--dry-run", "--json")
    told = json.loads(peftfx(*words).out)
    assert (told["parameters"], told["files"]["model.onnx.data"]) == (count, 4 * count)
    told = peftfx("inspect", tmp_path / "base", "--rules", "lora(r=1)@attention.output").out
    assert f"all params: {count + 32:,} ||" in told


def test_graphs_that_are_missing_or_cut_are_told(inputs: Inputs, peftfx: Command, tmp_path: Path) -> None:
    words = ("export", "--base", inputs.classifier, "--adapter", inputs.lora, "--output", tmp_path / "out", "--quiet")
    assert peftfx(*words).code == 0
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert peftfx("diff", tmp_path / "out", tmp_path / "copy").out.strip() == "the same export"
    data = tmp_path / "copy" / "model.onnx.data"
    weights = data.read_bytes()
    data.write_bytes(bytes([weights[0] ^ 1]) + weights[1:])
    done = peftfx("diff", tmp_path / "out", tmp_path / "copy")
    assert (done.code, done.out.split(": ")[0]) == (1, "content.model.onnx.data")
    assert "not as written" not in peftfx("info", tmp_path / "copy").out
    (tmp_path / "copy" / "model.onnx").unlink()
    whole = data.stat().st_size
    data.write_bytes(data.read_bytes()[:100])
    told = ["model.onnx is missing", f"model.onnx.data has 100 bytes, and was written with {whole:,}"]
    assert json.loads(peftfx("info", tmp_path / "copy", "--json").out)["facts"]["not as written"] == told
    for other in ("out", "copy"):
        done = peftfx("diff", tmp_path / other, tmp_path / "copy", "--json")
        assert (done.code, json.loads(done.out)["fields"]["not as written"][1]) == (1, told)


def test_diff_tells_what_differs(inputs: Inputs, peftfx: Command, tmp_path: Path) -> None:
    same = peftfx("diff", inputs.lora, inputs.lora)
    assert (same.code, same.out.strip()) == (0, "the same adapter: 8 tensors")
    shutil.copytree(inputs.lora, tmp_path / "other")
    file = tmp_path / "other" / "adapter_model.safetensors"
    tensors = load_file(file)
    first, second, *_ = sorted(tensors)
    tensors[first] = tensors[first] * 1.5
    tensors[f"{second}.more"] = tensors.pop(second)
    save_file(tensors, file)
    config = json.loads((tmp_path / "other" / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "other" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 7}), encoding="utf-8")
    done = peftfx("diff", inputs.lora, tmp_path / "other", "--json")
    told = json.loads(done.out)
    assert (done.code, told["same"], told["fields"]) == (1, 6, {"lora_alpha": [6, 7]})
    (found,) = told["tensors"].values()
    assert found["relative"] == pytest.approx(0.5, rel=1e-5)
    assert len(told["only_first"]) == len(told["only_second"]) == 1
    assert "relative 0.5" in peftfx("diff", inputs.lora, tmp_path / "other").out
    assert_refused(peftfx("diff", inputs.lora, tmp_path), "there is no adapter_config.json")


def test_a_dry_run_tells_what_the_export_then_writes(inputs: Inputs, peftfx: Command, tmp_path: Path) -> None:
    words = ("export", "--base", inputs.classifier, "--adapter", inputs.lora, "--output", tmp_path / "out")
    done = peftfx(*words, "--dry-run", "--json")
    told = json.loads(done.out)
    assert (done.code, told["views"], told["model"]) == (0, ["forward"], "BertForSequenceClassification")
    assert not (tmp_path / "out").exists()
    assert "nothing was written" in peftfx(*words, "--dry-run").out
    quiet = peftfx(*words, "--quiet")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    written = {path.name: path.stat().st_size for path in (tmp_path / "out").iterdir()}
    assert written.keys() == told["files"].keys()
    assert abs(written["model.onnx.data"] - told["files"]["model.onnx.data"]) < 0.1 * written["model.onnx.data"]
    assert_refused(peftfx(*words, "--dry-run"), "the output exists already")
    other = ("export", "--base", inputs.classifier, "--output", tmp_path / "new", "--dry-run")
    assert_refused(peftfx(*other, "--max-memory", "1MB"), "are needed")
    assert_refused(peftfx(*other, "--view", "decode"), "decode")
    (tmp_path / "file").touch()
    inside = ("export", "--base", inputs.classifier, "--output", tmp_path / "file" / "new")
    for more in ((), ("--dry-run",)):
        assert_refused(peftfx(*inside, *more), "the output would be in a file")


def test_errors_are_json_too_and_causes_are_told(peftfx: Command, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{", encoding="utf-8")
    done = peftfx("inspect", tmp_path, "--json")
    told = json.loads(done.out)["error"]
    assert (done.code, told["exit_code"], told["where"]) == (2, 2, str(tmp_path / "config.json"))
    assert "caused by JSONDecodeError" in peftfx("inspect", tmp_path, "-v").err
    assert "caused by" not in peftfx("inspect", tmp_path).err
    assert_refused(peftfx("inspect", tmp_path, "-v", "-q"), "--quiet and --verbose are both given")


def test_a_base_is_found_in_the_local_cache(
    inputs: Inputs, peftfx: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert_refused(peftfx("inspect", "org/name"), "local Hugging Face cache", "pass --download to fetch it")
    model = tmp_path / "models--org--name"
    shutil.copytree(inputs.encoder, model / "snapshots" / "abc")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("abc", encoding="utf-8")
    found, given = (peftfx("inspect", place, "--json").out for place in ("org/name", inputs.encoder))
    assert json.loads(found) == json.loads(given)


@pytest.mark.parametrize("name", ["float16", "torch.float16", "half", "fp16", "FP16"])
def test_dtypes_have_torchs_names_too(name: str, inputs: Inputs, peftfx: Command, tmp_path: Path) -> None:
    words = ("export", "--base", inputs.classifier, "--output", tmp_path / "out", "--dry-run", "--json")
    assert json.loads(peftfx(*words, "--dtype", name).out)["dtype"] == "fp16"
    assert_refused(peftfx(*words[:-1], "--dtype", "float17"), "unknown dtype")
