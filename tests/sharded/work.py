"""What each of two processes does, where a spawned process can import it: it knows no `tests` package."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from sharded.processes import LORA, WAYS, adapted, llama, mean_of_all, train, two, whole_state
from support.parity import apart
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import peftfx
from peftfx.errors import PeftfxError
from peftfx.sharding import processes

PROMPT = peftfx.PromptTuning(num_virtual_tokens=3)
BUDGET = peftfx.AdaLoRA(init_r=4, target_r=2, tinit=0, tfinal=1, total_step=4)
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
    return apart(got, losses), max(apart(state[k], want[k]) for k in want)


class Deciding(nn.Module):
    """A norm whose code branches on its values, so that the model cannot be captured."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.inner = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if x.sum() > 0 else self.inner(-x)


def without_a_graph() -> tuple[float, float]:
    """What training a model that cannot be captured differs from one process by: losses, and the adapter."""
    rule, trained = peftfx.LoRA(r=4, target_modules=["q_proj", "down_proj"]), []
    for whole in (True, False):
        base = llama()
        base.model.norm = Deciding(base.model.norm)
        for part in () if whole else (*base.model.layers, base):
            fully_shard(part, mesh=two())
        trained.append(peftfx.transform(base, rule, seed=0))
    losses, got = train(trained[0]), mean_of_all(train(trained[1], rank=dist.get_rank()))
    state, want = whole_state(trained[1]), trained[0].state_dict()
    return apart(got, losses), max(apart(state[k], want[k]) for k in want)


def budgeted(model: peftfx.AdaptedModel, rank: int | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The losses, and the adapter, of steps that spend a budget of ranks."""
    optimizer, step = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2), itertools.count()
    optimizer.register_step_post_hook(lambda *_: model.update_and_allocate(next(step)))
    losses = train(model, 4, rank, optimizer)
    return losses, {name: tensor.float() for name, tensor in whole_state(model).items()}


def ranks() -> tuple[float, float]:
    """What spending a budget of ranks differs from one process by: losses, and the adapter with the ranks it keeps."""
    losses, want = budgeted(peftfx.transform(llama(), BUDGET, seed=0))
    got, state = budgeted(adapted(BUDGET, "adapted"), dist.get_rank())
    assert state.keys() == want.keys()
    return apart(mean_of_all(got), losses), max(apart(state[k], want[k]) for k in want)


def message(call: Any) -> str:
    """Of the error that a call raises."""
    try:
        call()
    except PeftfxError as error:
        return str(error)
    return "no error"


def tokens(model: peftfx.AdaptedModel) -> Tensor:
    """What a model generates."""
    return model.eval().generate(torch.arange(3, 13)[None], max_new_tokens=4, do_sample=False)  # type: ignore[return-value]


def everything(folder: Path) -> dict[str, Any]:
    """What one process sees of what both do."""
    found: dict[str, Any] = {}
    ddp = peftfx.transform(llama(), LORA, seed=0)
    found["ddp"] = off(LORA, DistributedDataParallel(ddp), ddp)
    model = adapted(LORA, "before")
    found["before"] = off(LORA, model, model)
    prompt = adapted(PROMPT, "layers", seed=dist.get_rank())  # nobody shards the prompt: all take the first process's
    found["prompt"] = off(PROMPT, prompt, prompt)
    found["without a graph"] = without_a_graph()
    found["ranks"] = ranks()
    model = adapted(LORA, "adapted")
    found["adapted"] = off(LORA, model, model)
    found["kinds"] = sorted({type(p).__name__ for p in model.parameters()})
    processes.PATIENCE /= 20
    calls = (lambda: model.save_pretrained(folder / "none"), lambda: model.export(folder / "none"))
    found["alone"] = [message(call) for call in calls if dist.get_rank() == 0]
    dist.barrier()
    processes.PATIENCE *= 20
    model.save_pretrained(folder / "adapter")
    report = model.export(folder / "onnx", view="forward")
    found["report"] = report.tensors
    found["tokens"] = tokens(model)
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(3, 13)[None])  # the root keeps its weights gathered
    model.merge()
    model.reshard()  # type: ignore[operator]
    with torch.no_grad():
        found["merged"] = model.eval()(input_ids=torch.arange(3, 13)[None]).logits.detach()
    return found


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
    again = apart(*(mean_of_all(train(one, 2, dist.get_rank())) for one in (other, model)))
    differs = max(apart(got[k], want[k]) for k in want)
    return max(differs, again), sorted(state)


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
    biases = llama(biases=True)
    for layer in biases.model.layers:
        layer.self_attn.v_proj.bias = layer.self_attn.k_proj.bias
    with_biases = peftfx.transform(biases, peftfx.LoRA(r=2, target="v_proj", lora_bias=True))
    fully_shard(with_biases, mesh=two())
    return [
        message(lambda: peftfx.transform(parallel, LORA)),
        message(head.merge),
        message(with_biases.merge),
    ]


def tied(folder: Path) -> dict[str, Any]:
    """What two processes export and merge of a base whose head and embedding are one tensor."""
    found: dict[str, Any] = {}
    for target in ("attention", "copy", "head"):
        copied = {"target": "attention", "modules_to_save": ["lm_head"]} if target == "copy" else {"target": target}
        model = peftfx.transform(llama(tied=True), peftfx.LoRA(r=2, **copied), seed=0)
        for layer in model.base.model.layers:
            fully_shard(layer, mesh=two())
        fully_shard(model, mesh=two())
        train(model, steps=1, rank=dist.get_rank())
        model.save_pretrained(folder / target)
        if target == "head":  # the export unties what the adapter tells apart
            model.export(folder / "onnx", view="forward")
        found[target] = message(model.merge)
        with torch.no_grad():
            found[f"{target} logits"] = model.eval()(input_ids=torch.arange(3, 13)[None]).logits.detach()
    return found


def methods(folder: Path) -> dict[str, tuple[float, float]]:
    found = {}
    for rule in METHODS:
        for way in WAYS:
            model = adapted(rule, way)
            found[f"{rule}: {way}"] = off(rule, model, model)
    return found
