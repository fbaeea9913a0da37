"""Options: checked whole when they are made, however they are made, before a model is looked at."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import get_type_hints

import pytest
from torch import nn

import peftfx
from peftfx import ExportOptions, LoRA, PeftfxError
from peftfx.export import Report, VerificationError, export_adapter, export_onnx
from peftfx.export.adapter_command import export_adapter_directories
from peftfx.export.command import export_directory
from peftfx.export_options.adapter import (
    AdapterChanges,
    AdapterDirectoryChanges,
    AdapterDirectoryOptions,
    AdapterOptions,
)
from peftfx.export_options.directory import DirectoryChanges, DirectoryOptions
from peftfx.export_options.export import ExportChanges
from peftfx.export_options.values import Slots
from peftfx.methods import methods
from peftfx.model.adapted import AdaptedModel
from peftfx.rules.peft_files import method_from_config
from peftfx.rules.text import parse_rules

#: Options that make no sense, and what is said of them.
WRONG: list[tuple[dict[str, object], str]] = [
    ({"view": "deocde"}, "unknown view 'deocde'"),
    ({"view": None}, "view=None"),
    ({"engine": "fastest"}, "one of fast, torch"),
    ({"optimize": "gpu"}, "one of cpu, cuda, none"),
    ({"quantize": "int2"}, "one of int8, int4"),
    ({"merge": "no"}, r"merge='no' \(bool \| None\)"),
    ({"force": 1}, r"force=1 \(bool\)"),
    ({"opset": 3}, "18 to 25"),
    ({"opset": "21"}, r"opset='21' \(int \| None\)"),
    ({"atol": -1}, "a tolerance must be 0 or more"),
    ({"atol": float("nan")}, r"atol=nan \(float \| None; it must be finite\)"),
    ({"max_memory": "much"}, "as in 4GB"),
    ({"image_size": "large"}, "as in 384x512"),
    ({"merged_decoder": True, "slots": "mlp"}, "merged_decoder, slots"),
    ({"merged_decoder": True, "batched": ("one",)}, "leave one out"),
    ({"image_size": (0, 32)}, "not a size of images"),
    ({"image_size": 1.5}, r"image_size=1.5 \(int"),
    ({"slots": "mlp |"}, "cannot read the target"),
    ({"max_error": 0.1}, "pass quantize too"),
    ({"quantize": "int8", "max_error": "much"}, "not a bound on an error"),
    ({"quantize": "int8", "max_error": "top1=1.5"}, "no share is larger than 1"),
    ({"quantize": "int8", "calibration": "nowhere.txt"}, "there is no such file"),
    ({"quantize": "int8", "rtol": 0.1}, "bounded by max_error, not by rtol"),
    ({"batched": "one"}, "batched='one'"),
    ({"batched": ("one", "one")}, "names an adapter twice"),
    ({"batched": ("one",), "slots": "mlp"}, "batched and swappable are both given"),
    ({"batched": ("one",), "merge": True}, "leave merge out"),
    ({"slots": "mlp", "merge": True}, "chosen when the graph runs"),
    ({"batched": ("one",), "quantize": "int8", "calibration": __file__}, "cannot be compared on a text"),
    ({"veiw": "decode"}, "did you mean 'view'"),
]
OF_DIRECTORIES: list[tuple[dict[str, object], str]] = [
    ({"dtype": "fp8"}, "one of fp32, fp16, bf16"),
    ({"task": "text-clasification"}, "did you mean 'text-classification'"),
    ({"adapter": "a", "batched": {"one": "b"}}, "adapter and batched are both given"),
    ({"adapter": "a", "slots": "mlp"}, "from the base only"),
    ({"dtype": "bf16", "quantize": "int8"}, "not quantised"),
    ({"quantize_base": "fp4"}, "one of nf4"),
    ({"quantize_base": "nf4", "dtype": "fp16"}, "compute in fp32, not in fp16"),
    ({"batched": ("one",)}, "batched="),
]


class Untouched(nn.Module):
    """A model that nothing may look at."""

    def __getattr__(self, name: str) -> object:
        raise AssertionError(f"{name} was asked for")


@pytest.mark.parametrize(("given", "said"), WRONG, ids=str)
def test_wrong_options_are_told_before_the_model_is_looked_at(given: dict[str, object], said: str) -> None:
    model: nn.Module = Untouched.__new__(Untouched)
    calls: list[Callable[[], object]] = [
        lambda: ExportOptions.of(None, given),
        lambda: export_onnx(model, "out", **given),  # type: ignore[arg-type]
        lambda: AdaptedModel.export(model, "out", **given),  # type: ignore[arg-type]
    ]
    if "batched" not in given:  # directories by name, there
        calls.append(lambda: export_directory("nowhere", "out", **given))  # type: ignore[arg-type]
    for call in calls:
        with pytest.raises(PeftfxError, match=said):
            call()


@pytest.mark.parametrize(("given", "said"), OF_DIRECTORIES, ids=str)
def test_those_of_directories_too(given: dict[str, object], said: str) -> None:
    for call in (lambda: DirectoryOptions.of(None, given), lambda: export_directory("nowhere", "out", **given)):
        with pytest.raises(PeftfxError, match=said):
            call()


def test_a_change_is_checked_with_what_was_there() -> None:
    options = ExportOptions(quantize="int8", max_error=0.1)
    with pytest.raises(PeftfxError, match="pass quantize too"):
        dataclasses.replace(options, quantize=None)
    with pytest.raises(PeftfxError, match="pass quantize too"):
        export_onnx(nn.Linear(2, 2), "out", options, quantize=None)
    with pytest.raises(PeftfxError, match="options by name"):
        export_onnx(nn.Linear(2, 2), "out", "decode")  # type: ignore[arg-type]
    assert ExportOptions.of(options, {"view": "decode"}) == dataclasses.replace(options, view="decode")
    assert options.view == "auto"
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.view = "decode"  # type: ignore[misc]


def test_options_keep_their_own_values() -> None:
    names, folders = ["b", "a"], {"b": "x", "a": "y"}
    options, directories = ExportOptions(batched=names, max_memory="2KiB"), DirectoryOptions(batched=folders)
    names.clear()
    folders.clear()
    assert tuple(options.batched) == ("b", "a")
    assert options.memory == 2048
    assert directories.folders == {"b": Path("x"), "a": Path("y")}
    assert Slots.of("mlp") == Slots("mlp", True)
    assert hash(directories) != hash(DirectoryOptions(view="decode"))


TAKERS = [
    (export_onnx, ExportOptions, ExportChanges),
    (AdaptedModel.export, ExportOptions, ExportChanges),
    (export_directory, DirectoryOptions, DirectoryChanges),
    (export_adapter, AdapterOptions, AdapterChanges),
    (export_adapter_directories, AdapterDirectoryOptions, AdapterDirectoryChanges),
]


@pytest.mark.parametrize(("function", "options", "changes"), TAKERS, ids=lambda value: value.__name__)
def test_a_signature_shows_the_options(function: Callable[..., object], options: type, changes: type) -> None:
    shown, plain = inspect.signature(function).parameters, options()
    assert all(shown[f.name].default == getattr(plain, f.name) for f in dataclasses.fields(options))
    assert not [p for p in shown.values() if p.kind is p.VAR_KEYWORD]
    assert set(get_type_hints(changes)) == {f.name for f in dataclasses.fields(options)} <= set(shown)
    own, told = get_type_hints(options), get_type_hints(changes)
    assert {name: told[name] for name in told if name != "batched"} == {n: own[n] for n in told if n != "batched"}
    assert function.__code__.co_argcount + function.__code__.co_kwonlyargcount <= 9  # type: ignore[attr-defined]


def test_an_export_returns_a_report() -> None:
    assert inspect.signature(AdaptedModel.export).return_annotation == Report.__name__


def test_the_command_line_has_an_option_for_each() -> None:
    from peftfx.cli import main

    typed = set(inspect.signature(main.export).parameters) - {"base", "output"}
    asked = {f.name for f in dataclasses.fields(DirectoryOptions)}
    assert typed - asked == {"swappable", "prefix", "dry_run", "download", "passes"}
    assert asked <= typed
    typed = set(inspect.signature(main.export_adapter).parameters)
    assert typed == {
        "adapter",
        "graph",
        "output",
        "download",
        *(f.name for f in dataclasses.fields(AdapterDirectoryOptions)),
    }


def test_the_exit_code_is_the_class_s() -> None:
    class Kind(VerificationError):
        """A kind of disagreement."""

    assert (PeftfxError.exit_code, VerificationError.exit_code, Kind("x").exit_code) == (2, 1, 1)


OPTIONS = [("use_dora", "no", "bool"), ("r", "8", "int"), ("r", True, "int"), ("lora_alpha", "16", "float")]


@pytest.mark.parametrize(("name", "value", "kind"), OPTIONS, ids=str)
def test_a_method_s_options_are_checked_however_it_is_made(name: str, value: object, kind: str) -> None:
    config = {"peft_type": "LORA", "target_modules": ["query"], name: value}
    ways: dict[str, Callable[[], object]] = {
        "directly": lambda: LoRA(**{name: value}),  # type: ignore[arg-type]
        "replaced": lambda: dataclasses.replace(LoRA(), **{name: value}),  # type: ignore[arg-type]
        "as a text": lambda: parse_rules(f"lora({name}={value!r})"),
        "by options": lambda: LoRA.from_options({name: value}),
        "from a file": lambda: method_from_config(json.loads(json.dumps(config)), "adapter_config.json"),
    }
    for way, make in ways.items():
        with pytest.raises(PeftfxError) as raised:
            make()
        assert f"{name}={value!r} ({kind}" in str(raised.value), way


def test_every_option_of_every_method_has_a_type_that_is_checked() -> None:
    """Nothing that any option may be is an object of a class made here."""
    strange = type("Strange", (), {"__repr__": lambda self: "strange"})()
    for cls in methods().values():
        for option in dataclasses.fields(cls):
            with pytest.raises(PeftfxError, match=f"{option.name}=strange"):
                cls(**{option.name: strange})
    assert peftfx.ExportOptions is ExportOptions
