"""Bad input, on the command line, is one clear message and an exit code; nothing is left behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command import Inputs, Result, assert_refused, typed

from peftfx.export.verification.eager.reference import EagerReference

Damage = Callable[[Path, Path], None]
FULL = 'mount -t tmpfs -o size=SIZE none "$1" && shift && "$@"; code=$?; ls -A "$DISK"; exit $code'


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
    "an adapter for a base": (
        lambda b, a: shutil.copy(a / "adapter_config.json", Path(shutil.move(b / "config.json", b / "c")).parent),
        ("this is an adapter, and not a base", "--adapter"),
    ),
    "base without config": (lambda b, a: (b / "config.json").unlink(), ("no config.json", "base")),
    "corrupt base config": (lambda b, a: cut(b / "config.json"), ("not valid JSON", "config.json")),
    "base config is a list": (lambda b, a: (b / "config.json").write_text("[]"), ("not a JSON object", "config.json")),
    "unknown model type": (
        lambda b, a: (b / "config.json").write_text('{"model_type": "brt"}'),
        ("no model type 'brt'", "did you mean 'bert'"),
    ),
    "truncated base": (lambda b, a: cut(b / "model.safetensors"), ("safetensors file is broken", "model.safetensors")),
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


def test_a_file_in_place_of_a_folder_is_told(inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path) -> None:
    def refused(base: Path, adapter: Path, *texts: str) -> None:
        assert_refused(peftfx("export", "--base", base, "--adapter", adapter, "--output", tmp_path / "out"), *texts)

    single = tmp_path / "kohya.safetensors"
    save_file({"lora_te_x.lora_down.weight": torch.zeros(2, 4)}, single)
    refused(inputs.classifier, single, "this is a file", "peftfx convert --base BASE --file FILE")
    refused(inputs.classifier, inputs.lora / "adapter_model.safetensors", "this is a file", "the folder that it is in")
    refused(inputs.classifier / "model.safetensors", inputs.lora, "another file", "the folder that it is in")
    words = ("convert", "--base", inputs.classifier, "--file", inputs.lora, "--output", tmp_path / "out")
    assert_refused(peftfx(*words), "this is a folder", "an adapter's folder with --adapter")
    shutil.copytree(inputs.classifier, tmp_path / "hub" / "snapshots" / "abc")
    refused(tmp_path / "hub", inputs.lora, "no config.json", "snapshots/abc")


def test_a_module_to_save_that_the_base_does_not_have_is_told(
    inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path
) -> None:
    """HF PEFT passes over it, and loads the file's head by its name."""
    shutil.copytree(inputs.lora, tmp_path / "adapter")
    change(tmp_path / "adapter", modules_to_save=["clasifier"])
    words = ("export", "--base", inputs.classifier, "--adapter", tmp_path / "adapter")
    result = peftfx(*words, "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert "warning: " in result.err
    assert "no module is named clasifier" in result.err
    assert "did you mean 'classifier'" in result.err


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


@pytest.mark.parametrize("command", ["export", "merge"])
def test_a_value_that_another_would_replace_is_told(
    command: str, inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path
) -> None:
    """Of two adapters only the last was folded in."""
    two = ("--adapter", inputs.lora, "--adapter", inputs.adapter)
    refused = peftfx(command, "--base", inputs.classifier, *two, "--output", tmp_path / "out")
    assert_refused(refused, "--adapter is given 2 times, and takes one value")
    told = peftfx(command, "--json", "--base", inputs.classifier, *two, "--output", tmp_path / "out")
    assert json.loads(told.out)["error"]["where"] == "--adapter"
    assert peftfx("info", inputs.lora, "--quiet", "-q").code == 0


def test_in_a_process_of_its_own_an_error_is_no_traceback(tmp_path: Path) -> None:
    done = typed("export", "--base", tmp_path / "nowhere", "--output", tmp_path / "out")
    assert_refused(done, "no such directory", str(tmp_path / "nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_a_failed_verification_is_exit_code_1_and_leaves_nothing(
    inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = EagerReference.__call__
    monkeypatch.setattr(
        EagerReference, "__call__", lambda self, feed: {n: v + 0.01 for n, v in eager(self, feed).items()}
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
