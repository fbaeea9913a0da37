"""The law that only soft prompts have: the saved prompt is all that has an effect."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from peftfx.contract.sequence import SequenceMethod
from peftfx.rules.peft_files import STATE
from peftfx.testing.cases import Case
from peftfx.testing.setup import LOOSE, adapt, assert_close, bare_case, output


@torch.no_grad()
def saved(case: Case, method: SequenceMethod) -> None:
    """The saved prompt has the shape that the method states, and loading only that prompt gives the same outputs."""
    adapted = adapt(case, method)
    (placement,) = adapted.adapter("default").placements.prompts
    sized, p = placement.method, adapted.adapter("default").params(placement)
    table = sized.saved(p)
    assert tuple(table.shape) == tuple(sized.saved_shape()), f"saved {list(table.shape)}, not {sized.saved_shape()}"
    of_file = sized.virtual(sized.written(p), False)
    assert_close(of_file, sized.virtual(p, False), 1e-6, "of the saved prompt")
    with tempfile.TemporaryDirectory() as directory:
        adapted.save_pretrained(directory)
        (Path(directory) / STATE).unlink(missing_ok=True)
        other = bare_case(case)
        other.load_adapter(directory, "default")
    assert_close(output(other, case.inputs()), output(adapted, case.inputs()), LOOSE[case.spec.dtype], "loaded")
