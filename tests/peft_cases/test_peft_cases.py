"""HF PEFT's cases (`checks.py`) are what `docs/peft-cases.md` says. A default run has a few."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_cases.checks import CHECKS, Bench, Case, backward, cases, run, weighed
from peft_cases_page import PAGE, SAID, statuses

from peftfx.methods import methods

QUICK = frozenset(
    {
        'LORA/MLP/target_modules=["lin0"] lora_alpha=4 lora_dropout=0.1',
        'LORA/embedding and Conv1D/target_modules=["emb", "conv1d"] use_dora=true',
        'LORA/embedding and Conv1D/target_modules=["conv1d"] trainable_token_indices={"emb": [0, 10]}',
        'LORA/conv2d of 2 groups/target_modules=["conv2d"] use_dora=true',
        'LORA/MLP/target_modules=["lin0"] r=4 kasa_config={}',
        'LORA/attention/target_modules=["mha", "lin0"]',
        'IA3/conv2d/target_modules=["conv2d", "lin0"] feedforward_modules=["conv2d"]',
        'ADALORA/conv2d/target_modules=["conv2d", "lin0"] init_lora_weights=false total_step=1',
        'VERA/MLP/target_modules=["lin0"] modules_to_save=["lin1"]',
        'LN_TUNING/MLP with norms/target_modules=["layernorm0"] modules_to_save=["layernorm1"]',
        'TRAINABLE_TOKENS/embedding and Conv1D/target_modules=["emb"] token_indices=[0, 1, 3] init_weights=false',
    }
)
WHOLE = (pytest.mark.peft_cases, pytest.mark.slow)
PAGE_SAYS = statuses(PAGE.read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "case", [pytest.param(c, id=str(c), marks=pytest.mark.peft_cases if str(c) in QUICK else WHOLE) for c in cases()]
)
def test_a_case_is_what_the_page_says(case: Case, tmp_path: Path) -> None:
    result = run(case, tmp_path)
    assert result.checks == PAGE_SAYS[str(case)], result.notes


def test_the_page_has_all_of_pefts_table_and_nothing_on_it_is_wrong() -> None:
    assert PAGE_SAYS.keys() == {str(case) for case in cases()} >= QUICK
    wrong = {case for case, checks in PAGE_SAYS.items() if not set(checks.values()) <= set(SAID)}
    assert not wrong
    assert len(cases()) == 331


def test_every_method_of_the_table_is_here_and_has_all_checks() -> None:
    assert {case.method for case in cases()} <= methods().keys()
    assert all(checks.keys() == set(CHECKS) for checks in PAGE_SAYS.values())


def test_pefts_gradient_at_an_attentions_output_is_half_of_what_its_loss_changes_by(tmp_path: Path) -> None:
    bench = Bench(Case("LORA", "attention", {"target_modules": ["mha"]}), tmp_path)
    theirs, x = bench.theirs().double(), bench.calls[0]["x"].double()
    backward(theirs, {"x": x})
    factors = {}
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            step, losses = 1e-5 * torch.randn(parameter.shape, dtype=torch.float64), []
            with torch.no_grad():
                for sign in (1, -2, 1):  # ahead, behind, back
                    parameter.add_(sign * step)
                    losses.append(weighed(theirs(x)).item())
            factors[name] = (losses[0] - losses[1]) / 2 / (parameter.grad * step).sum().item()
    assert factors == {name: pytest.approx(2 if ".out_proj." in name else 1, rel=1e-5) for name in factors}
    assert len(factors) == 4
