"""What Python shows of public objects is short, and tells them apart."""

from __future__ import annotations

import torch
from torch import nn

import peftfx


def test_public_objects_are_shown_in_a_line() -> None:
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2)).eval()
    inputs = {"input": torch.randn(3, 8)}
    plan = peftfx.plan(model, "lora(r=2)@linear", inputs=inputs)
    adapted = peftfx.transform(model, "lora(r=2)@linear", inputs=inputs)
    first = adapted.sites.by_path("0")
    assert repr(first) == "WeightSite('0', linear, 6x8)"
    assert repr(adapted.sites) == "Sites(linear 2)"
    assert repr(adapted.adapter("default")) == "Adapter(LoRA: 1 place, 28 parameters)"
    assert repr(plan) == "Plan(lora(r=2)@linear: 28 parameters)"
    told = "AdaptedSequential(default: Adapter(LoRA: 1 place, 28 parameters); active: default; road: modules)"
    assert repr(adapted) == told
    assert repr(adapted.graph()).startswith("Graph(input [")
    assert repr(adapted.merge()).startswith("MergeReport(1 site, ")
