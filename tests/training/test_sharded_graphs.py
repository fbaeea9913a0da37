"""What is said of a sharded model whose calls would run a graph."""

from __future__ import annotations

import pytest
from torch import nn

from peftfx.errors import PeftfxError
from peftfx.model.processes import gathered


@pytest.mark.parametrize(("hosted", "hint"), [(True, 'road="modules"'), (False, "train under DDP")])
def test_the_road_that_runs_is_named(hosted: bool, hint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathered, "is_sharded", lambda model: True)
    with pytest.raises(PeftfxError, match="calls run a graph, which cannot gather them: a bare parameter") as told:
        gathered.refuse_graph(nn.Linear(1, 1), "a bare parameter", hosted=hosted)
    assert hint in str(told.value)
