"""The first tokens of a text: where a model computes something else for them, an export of its decode is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

import peftfx
from peftfx.errors import PeftfxError
from peftfx.views.finding.decode_view import decode_view

SIZE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 32}


class Greets(hf.LlamaForCausalLM):
    """Its code asks whether there are earlier tokens, and multiplies the logits if there are none."""

    by = 3.0

    def forward(self, input_ids: Any = None, attention_mask: Any = None, cache: Any = None, **kwargs: Any) -> Any:
        first = cache is None or cache.get_seq_length() == 0
        output = super().forward(input_ids=input_ids, attention_mask=attention_mask, cache=cache, **kwargs)
        if first:
            output.logits = output.logits * self.by
        return output


class GreetsInVain(Greets):
    """Its code asks, and computes the same."""

    by = 1.0


def build(kind: type[Greets]) -> Greets:
    torch.manual_seed(0)
    return kind(hf.LlamaConfig(**SIZE)).eval()


def test_a_decode_export_that_is_right_only_behind_other_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeftfxError, match=r"for the first tokens .* right only where past > 0 \[test_empty_sizes") as e:
        peftfx.export_onnx(build(Greets), tmp_path / "out", view="decode")
    assert "use the forward view" in str(e.value)
    assert not (tmp_path / "out").exists()


def test_a_branch_for_the_first_tokens_that_changes_nothing_is_no_limit(tmp_path: Path) -> None:
    report = peftfx.export_onnx(build(GreetsInVain), tmp_path / "out", view="decode")
    assert report.sizes == []
    assert any(shapes["past_key_values.0.key"][2] == 0 for shapes in report.probes)


def test_generation_in_torch_takes_the_branch_of_the_first_tokens() -> None:
    ours = peftfx.transform(build(Greets), peftfx.LoRA(r=2))
    ids = torch.randint(64, (2, 5), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": False, "max_new_tokens": 3, "output_logits": True, "return_dict_in_generate": True}
    want, got = (
        m.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options) for m in (build(Greets), ours)
    )
    for one, other in zip(want.logits, got.logits, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)


def test_only_code_that_asks_is_noted() -> None:
    told = {}
    for kind in (hf.LlamaForCausalLM, Greets):
        model = build(kind)  # type: ignore[arg-type]
        view = decode_view(model)
        graph = peftfx.capture(model, view.inputs(model), axes=view.axes, call=view)
        told[kind] = [str(condition) for condition in graph.filled]
    assert told == {hf.LlamaForCausalLM: [], Greets: ["past > 0"]}
