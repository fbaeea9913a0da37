"""Rows that a mask chooses, equally many in each text: classifiers read the last end token of each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from support.adapted import randomise
from torch import Tensor, nn

import peftfx


class LastMarked(nn.Module):
    """Classifies a text by the last of its marked tokens, as BART does; all texts have equally many of them."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.dense, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        rows = torch.tanh(self.inner(self.words(ids)))
        marked = ids == 2
        torch._check(torch.unique_consecutive(marked.sum(1)).numel() == 1)
        chosen = rows[marked, :]
        torch._check(chosen.shape[0] // rows.shape[0] >= 1)
        last = chosen.view(rows.size(0), -1, rows.size(-1))[:, -1, :]
        return self.out(torch.tanh(self.dense(last)))  # type: ignore[no-any-return]


MARKED = torch.tensor([[5, 2, 7, 2], [2, 2, 3, 8]])
OTHERS = ([[2, 4, 5]], [[3, 3, 4, 5, 2, 6], [2, 3, 4, 5, 6, 7], [6, 2, 5, 4, 3, 3]], [[2, 2, 2], [2, 2, 2]])


def test_a_layer_behind_rows_that_a_mask_chooses_is_adapted(tmp_path: Path) -> None:
    """How such rows lie in memory follows from values: torch 2.15 asks for it where a trace begins."""
    rule = peftfx.LoRA(r=2, target=["inner", "dense", "out"])
    adapted = peftfx.transform(LastMarked().eval(), rule, inputs={"ids": MARKED})
    randomise(adapted)
    adapted.export(tmp_path / "out")
    for texts in OTHERS:
        ids = torch.tensor(texts)
        torch.testing.assert_close(adapted.graph({"ids": MARKED})(ids=ids), adapted(ids=ids))
        torch.testing.assert_close(peftfx.export.OnnxModel(tmp_path / "out")(ids=ids)["output"], adapted(ids=ids))


UNEQUAL = ([[2, 2, 2, 3], [2, 3, 4, 5]], [[3, 2, 2, 2], [2, 4, 2, 5], [2, 4, 5, 6]], [[3, 4], [5, 6]])


@pytest.mark.parametrize("texts", UNEQUAL)
def test_texts_with_unequal_counts_are_refused_as_in_the_code(texts: list[list[int]], tmp_path: Path) -> None:
    model, ids = LastMarked().eval(), torch.tensor(texts)
    peftfx.export_onnx(model, tmp_path / "out", inputs={"ids": MARKED})
    with pytest.raises(RuntimeError):
        model(ids)
    with pytest.raises((RuntimeError, IndexError)):
        peftfx.capture(model, {"ids": MARKED})(ids=ids)
    with pytest.raises(Exception, match=r"Reshape|Gather"):
        peftfx.export.OnnxModel(tmp_path / "out")(ids=ids)


def test_a_transformers_classifier_refuses_unequal_counts_of_end_tokens() -> None:
    """Its own error is a `ValueError`; a graph's view of the rows says that they are too few."""
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "d_model": 8}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 20}
    model = hf.BartForSequenceClassification(hf.BartConfig(**sizes, **heads, num_labels=3)).eval()
    ids = torch.tensor([[4, 2, 5, 6, 2], [2, 7, 8, 2, 1]])
    graph = peftfx.capture(model)
    mask = torch.ones_like(ids)
    torch.testing.assert_close(graph(input_ids=ids, attention_mask=mask)["logits"], model(ids, mask).logits)
    ids[1, 1:4], ids[0, 2] = 9, 2
    with pytest.raises(ValueError, match="same number"):
        model(ids, mask)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        graph(input_ids=ids, attention_mask=mask)
