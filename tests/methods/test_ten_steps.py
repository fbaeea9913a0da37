"""Ten AdamW steps here and in `peft`, from one start and on the same batches, give the same adapter."""

from __future__ import annotations

import pytest
import ten_steps
from ten_steps import CLOSE, DROPOUT, METHODS, MODELS, Method, Model

#: By default, some methods on one model, others in their own files; `pytest -m slow` has every pair.
QUICK = {"LoRA": 0, "IA3": 1, "VeRA": 1, "LN tuning": 0, "Prefix tuning": 0}


def _pairs() -> list[object]:
    return [
        pytest.param(m, n, id=f"{m.name}-{n.name}", marks=() if QUICK.get(m.name) == place else pytest.mark.slow)
        for m in METHODS
        for place, n in enumerate(MODELS)
    ]


@pytest.mark.parametrize(("method", "model"), _pairs())
def test_the_adapter_is_pefts_with_dropout_and_without(
    method: Method, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[bool] = []
    train = ten_steps.train

    def watched(trained: object, batches: object) -> list[float]:
        losses = train(trained, batches)  # type: ignore[arg-type]
        moved.append(losses[-1] != losses[0])
        return losses

    monkeypatch.setattr(ten_steps, "train", watched)
    for dropout in (0.0, DROPOUT):
        found = ten_steps.compare(method, model, dropout)
        if found.reason:
            assert "Prefix" in method.name
            assert "classifier" in model.name, found.reason
            return
        assert found.adapter < CLOSE, found
        assert found.loss < CLOSE, found
    assert moved == [True] * 4
