"""Reports rank ways of rounding as perplexity on a text does, of a model that has learnt to write such text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import peftfx
from peftfx.demo.topics import TOPICS
from peftfx.export import OnnxModel

LENGTH = 64
WAYS = ("int8", "int4")


def letters() -> tuple[Tensor, Tensor]:
    """Windows of Python's language reference, a number a letter: to train on, and held out."""
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in TOPICS.values()).encode("ascii", "replace")
    ids = torch.tensor(list(text[: len(text) // LENGTH * LENGTH])).view(-1, LENGTH)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    return ids[order[64:]], ids[order[:64]]


def trained(ids: Tensor) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=128, num_key_value_heads=2, **size))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(250):
        rows = ids[torch.randint(len(ids), (16,), generator=torch.Generator().manual_seed(step))]
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def loss(logits: Tensor, ids: Tensor) -> float:
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()))


@pytest.mark.slow
def test_kl_and_top1_rank_as_perplexity_does(tmp_path: Path) -> None:
    train, held_out = letters()
    model = trained(train)
    with torch.no_grad():
        start = loss(model(input_ids=held_out).logits, held_out)
    assert start < 2.2, "it has learnt something: a uniform guess is 4.9"
    costs, kls, tops = [], [], []
    for number, way in enumerate(WAYS):
        out = tmp_path / str(number)
        report = peftfx.transform(model, peftfx.LoRA(r=2)).eval().export(out, quantize=way, view="decode")
        served = OnnxModel(out)
        shapes = {name: shape for name, shape in served.axes.items() if name.startswith("past")}
        feed = {name: torch.zeros(len(held_out), int(shape[1]), 0, int(shape[3])) for name, shape in shapes.items()}
        feed |= {"input_ids": held_out, "attention_mask": torch.ones_like(held_out)}
        feed["position_ids"] = torch.arange(LENGTH).expand(len(held_out), -1)
        got = served(**{name: value for name, value in feed.items() if name in served.inputs})["logits"]
        costs.append(loss(got, held_out) - start)
        kls.append(report.agreement["model"].kl)
        tops.append(report.agreement["model"].top1)
    for way, cost, kl, top in zip(WAYS, costs, kls, tops, strict=True):
        print(f"{way}: perplexity {math.exp(start + cost):.3f}, KL {kl:.2e}, top-1 {top:.3f}")
    assert costs == sorted(costs)
    assert kls == sorted(kls)
    assert tops == sorted(tops, reverse=True)
