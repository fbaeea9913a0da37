"""What the fuzzed cases share: one captured base, and one exported directory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fuzz.twins import Base
from transformers.utils import logging


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Base]:
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield Base.make(tmp_path_factory.mktemp("fuzz"))
    logging.set_verbosity(before)
    logging.enable_progress_bar()
