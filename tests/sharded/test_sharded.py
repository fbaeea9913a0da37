"""Two processes train, save, merge and export one adapter, and it is that of one process on the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded.processes import LORA, WAYS, adapted, in_two, llama, mean_of_all, train, two, whole_state
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import peftfx
from peftfx import sharding
from peftfx.errors import PeftfxError

PROMPT = peftfx.PromptTuning(num_virtual_tokens=3)
METHODS = [
    *(LORA, peftfx.LoRA(r=4, target="all-linear", use_dora=True), peftfx.VeRA(r=8), peftfx.IA3(), peftfx.LNTuning()),
    *(PROMPT, peftfx.PrefixTuning(num_virtual_tokens=3), peftfx.LlamaAdapter()),
]


def alone(rule: object, steps: int = 3) -> tuple[Tensor, peftfx.AdaptedModel]:
    """The losses of one process, and its model."""
    model = peftfx.transform(llama(), rule, seed=0)
    return train(model, steps), model


def off(rule: object, model: nn.Module, of: peftfx.AdaptedModel) -> tuple[float, float]:
    """What training in two processes differs from one by: losses, and the adapter."""
    losses, one = alone(rule)
    got = mean_of_all(train(model, rank=dist.get_rank()))
    state, want = whole_state(of), one.state_dict()
    return float((got - losses).abs().max()), max(float((state[k] - want[k]).abs().max()) for k in want)


def message(call: Any) -> str:
    """Of the error that a call raises."""
    try:
        call()
    except PeftfxError as error:
        return str(error)
    return "no error"


def everything(folder: Path) -> dict[str, Any]:
    """What one process sees of what both do."""
    found: dict[str, Any] = {}
    ddp = peftfx.transform(llama(), LORA, seed=0)
    found["ddp"] = off(LORA, DistributedDataParallel(ddp), ddp)
    model = adapted(LORA, "before")
    found["before"] = off(LORA, model, model)
    prompt = adapted(PROMPT, "layers")  # nobody shards the prompt
    found["prompt"] = off(PROMPT, prompt, prompt)
    model = adapted(LORA, "adapted")
    found["adapted"] = off(LORA, model, model)
    found["kinds"] = sorted({type(p).__name__ for p in model.parameters()})
    sharding.PATIENCE /= 20
    found["alone"] = message(lambda: model.save_pretrained(folder / "none")) if dist.get_rank() == 0 else ""
    dist.barrier()
    sharding.PATIENCE *= 20
    model.save_pretrained(folder / "adapter")
    report = model.export(folder / "onnx", view="forward")
    found["report"] = report.tensors
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(3, 13)[None])  # the root keeps its weights gathered
    model.merge()
    with torch.no_grad():
        found["merged"] = model.eval()(input_ids=torch.arange(3, 13)[None]).logits.detach()
    return found


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, in_two(everything, folder)


@pytest.mark.parametrize("way", ["ddp", "before", "adapted", "prompt"])
def test_two_processes_train_what_one_does(seen: tuple[Path, list[dict[str, Any]]], way: str) -> None:
    assert all(max(found[way]) < 1e-5 for found in seen[1])
    assert seen[1][0]["kinds"] == ["DTensor"]


def test_what_is_saved_merged_and_exported_is_the_adapter_of_one_process(
    seen: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, both = seen
    _, one = alone(LORA)
    loaded = peftfx.load(llama(), folder / "adapter")
    torch.testing.assert_close(loaded.state_dict(), one.state_dict(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        want = one.eval()(input_ids=torch.arange(3, 13)[None]).logits
    for found in both:
        torch.testing.assert_close(found["merged"], want, rtol=1e-4, atol=1e-5)
    assert both[0]["report"] == both[1]["report"]
    assert (folder / "onnx" / "model.onnx").is_file()


def test_one_process_alone_is_refused_before_it_waits_for_the_others(
    seen: tuple[Path, list[dict[str, Any]]],
) -> None:
    said = seen[1][0]["alone"]
    assert "rank 1 has not called it" in said
    assert "in every process" in said
    assert not (seen[0] / "none").exists()


def resumed(folder: Path) -> tuple[float, list[str]]:
    """What a run that DCP saved, and another took up, is off from one run by; and the names that were saved."""
    model = adapted(LORA, "adapted")
    train(model, 3, dist.get_rank())
    want = whole_state(model)
    state = model.state_dict()
    dcp.save({"model": state}, checkpoint_id=folder / "dcp")
    other = adapted(LORA, "adapted")
    state = other.state_dict()
    dcp.load({"model": state}, checkpoint_id=folder / "dcp")
    other.load_state_dict(state)
    got = whole_state(other)
    again = mean_of_all(train(other, 2, dist.get_rank())) - mean_of_all(train(model, 2, dist.get_rank()))
    differs = max(float((got[k] - want[k]).abs().max()) for k in want)
    return max(differs, float(again.abs().max())), sorted(state)


def refused(folder: Path) -> list[str]:
    """What is said of other ways of sharing a model out."""
    plan = {"q_proj": ColwiseParallel()}
    parallel = llama()
    for layer in parallel.model.layers:
        parallelize_module(layer.self_attn, two(), plan)
    tied = llama()
    tied.lm_head.weight = tied.model.embed_tokens.weight
    head = peftfx.transform(tied, peftfx.LoRA(r=2, target="lm_head"))
    fully_shard(head, mesh=two())
    return [
        message(lambda: peftfx.transform(parallel, LORA)),
        message(head.merge),
    ]


def methods(folder: Path) -> dict[str, tuple[float, float]]:
    found = {}
    for rule in METHODS:
        for way in WAYS:
            model = adapted(rule, way)
            found[f"{rule}: {way}"] = off(rule, model, model)
    return found


@pytest.mark.slow
def test_every_method_trains_in_two_processes(tmp_path: Path) -> None:
    for found in in_two(methods, tmp_path):
        assert {name: differs for name, differs in found.items() if max(differs) > 1e-5} == {}


@pytest.mark.slow
def test_dcp_saves_and_resumes_the_adapter_alone(tmp_path: Path) -> None:
    for differs, names in in_two(resumed, tmp_path):
        assert differs < 1e-6
        assert all(name.startswith("adapters.default.") for name in names)


@pytest.mark.slow
def test_other_ways_are_refused_and_fsdp2_is_named(tmp_path: Path) -> None:
    for said in in_two(refused, tmp_path):
        assert all("FSDP2" in line for line in said[:1]), said
        assert "each process has a part" in said[1]
