"""What is public: the names that `peftfx` shows, how they are found, and the paths that documents import."""

from __future__ import annotations

import importlib
import pydoc
import subprocess
import sys

import pytest
from house.public_stub import STUB, stub

import peftfx
from peftfx.discovery import method_classes

#: Import paths of README, CONTRIBUTING and the documents, and what they import from there.
DOCUMENTED = {
    "peftfx.export": ("OnnxModel", "Report", "VerificationError", "export_adapter", "export_onnx", "to_onnx"),
    "peftfx.graph": ("Graph",),
    "peftfx.method": ("Base", "Method", "Op", "Params", "Rows", "WeightMethod", "AttentionMethod", "OverrideMethod"),
    "peftfx.passes": ("Pass", "PassManager", "PassResult", "Insert", "Merge", "Remove"),
    "peftfx.runtime": ("load", "pipeline"),
    "peftfx.sites": ("Site", "Sites"),
    "peftfx.target": ("explain", "select"),
    "peftfx.vectors": ("row_index", "along_rows"),
}


def test_the_package_shows_its_public_names_and_no_others() -> None:
    shown = dir(peftfx)
    assert shown == sorted(peftfx.__all__)
    assert set(method_classes()) <= set(shown)
    assert not [name for name in shown if name.startswith("_") and name != "__version__"]
    for name in shown:
        assert getattr(peftfx, name) is not None


def test_help_shows_them() -> None:
    text = pydoc.plain(pydoc.render_doc(peftfx))
    for name in ("class LoRA", "class AdaptedModel", "transform(", "export_onnx("):
        assert name in text


def test_a_method_is_found_by_its_file_alone(tmp_path: object) -> None:
    for name, module in method_classes().items():
        assert getattr(peftfx, name) is getattr(importlib.import_module(module), name)


def test_what_is_not_public_is_an_attribute_error() -> None:
    for name in ("lora", "Nothing", "method_classes"):
        with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
            getattr(peftfx, name)


def test_editors_are_told_the_same() -> None:
    assert STUB.read_text(encoding="utf-8") == stub(), "run `python tests/house/public_stub.py`"


@pytest.mark.parametrize("module", DOCUMENTED)
def test_documented_imports_hold(module: str) -> None:
    found = importlib.import_module(module)
    for name in DOCUMENTED[module]:
        assert hasattr(found, name), name


@pytest.mark.parametrize("module", ["peftfx", "peftfx.cli"])
def test_the_package_is_a_command(module: str) -> None:
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == peftfx.__version__
