"""A token from which a boolean mask hides every key: ONNX Runtime gives what torch gives, which is 0."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from support.zoo import TOKENS, ZOO
from torch import Tensor, nn
from torch.nn import functional as F

import peftfx
import peftfx.runtime
from peftfx.export.translation.preparation import prepare

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
LOCAL = {"local_attention": 4, "global_attn_every_n_layers": 2, "sep_token_id": 3, "cls_token_id": 2, "num_labels": 3}


def modernbert(head: str) -> nn.Module:
    torch.manual_seed(0)
    model = getattr(hf, f"ModernBertFor{head}")(hf.ModernBertConfig(**TOKENS, **SIZES, **LOCAL))
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"slots": "all-linear"}], ids=["plain", "slots"])
def test_a_first_token_of_padding_is_classified_as_by_torch(options: dict[str, str], tmp_path: Path) -> None:
    """Local layers of ModernBERT see padding alone there; the classifier reads it."""
    model = modernbert("SequenceClassification")
    peftfx.export_onnx(model, tmp_path / "out", view="forward", **options)
    ids = torch.randint(5, 90, (3, 13), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5], mask[1, :10] = 0, 0
    given = {"input_ids": ids.masked_fill(mask == 0, TOKENS["pad_token_id"]), "attention_mask": mask}
    got, want = peftfx.runtime.load(tmp_path / "out")(**given).logits, model(**given).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (lambda: modernbert("SequenceClassification"), 1),  # for two local layers
        (lambda: modernbert("MaskedLM"), 0),  # each output is of a token, and those of padding do not count
        (lambda: ZOO["bert"].build(), 0),  # all tokens see the same
        (lambda: ZOO["llama"].build(), 0),  # nothing sees the padding
    ],
    ids=["pooled", "tokens", "bert", "llama"],
)
def test_nothing_is_done_where_it_does_not_matter(make: object, count: int) -> None:
    graph = prepare(peftfx.capture(make()))  # type: ignore[operator]
    assert sum(node.target is torch.ops.aten.any.dim for node in graph.nodes()) == count


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        y = self.linear(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return F.scaled_dot_product_attention(y, y, y, seen[:, None]).transpose(1, 2).flatten(2)


@torch.no_grad()
def test_a_mask_that_a_call_gives_may_hide_all(tmp_path: Path) -> None:
    model, x = Attends().eval(), torch.randn(2, 5, 8)
    seen = torch.ones(2, 5, 5, dtype=torch.bool).tril()
    peftfx.export_onnx(model, tmp_path / "out", inputs={"x": x, "seen": seen})
    seen[1, 2] = False
    got = peftfx.runtime.load(tmp_path / "out")(x=x, seen=seen)
    torch.testing.assert_close(next(iter(got.values())), model(x, seen), atol=1e-5, rtol=1e-5)
