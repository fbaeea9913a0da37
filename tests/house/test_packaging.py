"""Every module is found, however the package comes: installed, editable, from a clone, from a clone without links."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
from house.structure import PACKAGES, ROOT, Structure
from support.few import but_for

IMPORT_ALL = """
import importlib, sys
import peftfx
for name in sys.argv[1:]:
    found = importlib.import_module(name)
    assert name.startswith(found.__name__), (name, found)
print(peftfx.__file__)
"""


@pytest.fixture(scope="module")
def names() -> list[str]:
    """Every module but those that run a command when they are imported."""
    return [name for name in Structure.of(ROOT).files if not name.endswith("__main__")]


def test_the_packages_listed_are_the_folders() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {package for package, path in _packages()}
    assert set(config["packages"]) == folders
    assert config["package-dir"] == PACKAGES


def test_the_package_that_is_tested_has_every_module(names: list[str]) -> None:
    """In CI it is what the wheel installed: a folder that is not listed is not in it."""
    assert [name for name in names if find_spec(name) is None] == []


@pytest.mark.further
@pytest.mark.parametrize("links", but_for({"links", "text files"}, ["links", "text files", "nothing"]))
def test_a_clone_has_every_module(links: str, names: list[str], tmp_path: Path) -> None:
    for folder in PACKAGES.values():
        shutil.copytree(ROOT / folder, tmp_path / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    if links != "links":
        for name in ("passes", "export"):
            (tmp_path / "peftfx" / name).unlink()
            if links == "text files":
                (tmp_path / "peftfx" / name).write_text(f"../{name}")
    assert str(tmp_path) in _import_all(names, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("how", [(), ("--editable",)], ids=["wheel", "editable"])
def test_an_installation_has_every_module(how: tuple[str, ...], names: list[str], tmp_path: Path) -> None:
    """pip fetches what builds the package: this test needs an index of packages."""
    for folder in (*PACKAGES.values(), "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / folder).is_dir() else shutil.copy
        copy(ROOT / folder, tmp_path / folder, **({"symlinks": True} if copy is shutil.copytree else {}))
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    (packages,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    for path in Path(sysconfig.get_path("purelib")).iterdir():  # what it depends on is there already
        if "peftfx" not in path.name and not (packages / path.name).exists():
            (packages / path.name).symlink_to(path)
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", *how, tmp_path]
    subprocess.run(install, check=True, capture_output=True)
    assert str(tmp_path) in _import_all(names, None, python)


def _packages() -> list[tuple[str, Path]]:
    files = Structure.of(ROOT).files
    return [(name, path) for name, path in files.items() if path.name == "__init__.py"]


def _import_all(names: list[str], root: Path | None, python: Path | str = sys.executable) -> str:
    """Import every module in a process that sees `root` first; returns where the package was found."""
    places = [] if root is None else [str(root)]
    code = f"import sys; sys.path[:0] = {places!r}\n{IMPORT_ALL}"
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # it could name this clone
    done = subprocess.run([python, "-c", code, *names], cwd="/", env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout
