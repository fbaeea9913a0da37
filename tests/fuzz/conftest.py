"""What the fuzzed cases share: one captured base, and one exported directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.twins import ADAPTER, Base
from transformers.utils import logging

from peftfx.export.adapter_command import export_adapter_directories
from peftfx.export.command import export_directory
from peftfx.export.slots.swappable import Slots


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield Base.make(tmp_path_factory.mktemp("fuzz"))
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture(scope="session")
def exported(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with places for adapters, and an adapter for it."""
    root = tmp_path_factory.mktemp("exported") / "graph"
    export_directory(base.root / "base", root, view="decode", slots=Slots("attention.query"))
    lora = base.root / "query"
    base.adapted.add_adapter("query", "lora(r=2)@attention.query")
    base.adapted.save_pretrained(lora)
    base.adapted.remove()
    export_adapter_directories([str(lora)], root, root / ADAPTER, check=False)
    return root
