"""The tests capture each structure once, under every version of transformers: their time depends on it."""

from __future__ import annotations

import pytest
from support import captures
from support.zoo import ZOO

from peftfx.views import capture as capturing


@pytest.mark.parametrize("name", ["llama", "bert", "t5", "whisper"])
def test_a_second_model_of_one_structure_is_not_captured_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def capture(*args: object, **options: object) -> object:
        made.append(args)
        return _OWN(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(captures, "own_capture", capture)
    monkeypatch.setattr(capturing, "_captured", captures.remembering())
    first, second = ZOO[name].build(), ZOO[name].build()
    graphs = [capturing.capture(model, ZOO[name].inputs(model=model)) for model in (first, second)]
    assert len(made) == 1
    assert next(graphs[1].module.parameters()) is next(second.parameters())


_OWN = captures.own_capture
