"""What two processes do under DeepSpeed's ZeRO."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from sharded.processes import LORA, llama, mean_of_all
from sharded.work import BUDGET, message
from support.parity import apart
from torch import Tensor
from torch import distributed as dist

import peftfx


def trained_under_zero(folder: Path) -> dict[int, dict[str, Any]]:
    """Of each stage: what losses and the saved adapter differ from one process by, and what else is seen."""
    own = {"RANK": str(dist.get_rank()), "LOCAL_RANK": str(dist.get_rank()), "WORLD_SIZE": "2"}
    os.environ.update(own, MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
    return {stage: _stage(folder / str(stage), stage) for stage in (1, 2, 3)}


def _stage(folder: Path, stage: int) -> dict[str, Any]:
    one, model = (peftfx.transform(llama(), LORA, seed=0) for _ in range(2))
    want = torch.stack([_step(one, _sgd(one), batch) for batch in _batches()])
    losses = _losses(_engine(model, stage))
    found: dict[str, Any] = {"losses": float((losses - want).abs().max()), "ranks": _ranks_are_counted(stage)}
    if stage == 3 or dist.get_rank() == 0:
        model.save_pretrained(folder / "adapter")
    if stage == 3:
        found["report"] = str(model.export(folder / "onnx", view="forward"))
        found["merge"] = message(model.merge)
        found["again"] = message(lambda: peftfx.transform(model.base, LORA))
        found |= _partitioned_base(folder, want) | {"prefix": _behind_a_prefix()}
    dist.barrier()
    state, saved = one.state_dict(), peftfx.load(llama(), folder / "adapter").state_dict()
    found["saved"] = max(apart(saved[key], state[key]) for key in state)
    if stage == 3:
        parted = peftfx.load(llama(), folder / "parted").state_dict()
        found["parted saved"] = max(apart(parted[key], state[key]) for key in state)
    start = peftfx.transform(llama(), LORA, seed=0).state_dict()
    found["moved"] = max(float((start[key] - state[key]).abs().max()) for key in state)
    return found


def _partitioned_base(folder: Path, want: Tensor) -> dict[str, Any]:
    """What differs from one process if the base was made in parts (`zero.Init`), as `from_pretrained` makes it."""
    import deepspeed

    whole = llama().state_dict()
    with deepspeed.zero.Init(config_dict_or_path=_config(3)):
        base = llama()
    with deepspeed.zero.GatheredParameters(list(base.parameters()), modifier_rank=0):
        if dist.get_rank() == 0:
            base.load_state_dict(whole)
    model = peftfx.transform(base, LORA, seed=0)
    found = {"parted": base.lm_head.weight.numel(), "first": str(model.export(folder / "first", view="forward"))}
    losses = _losses(_engine(model, 3))
    model.save_pretrained(folder / "parted")
    return {
        **found,
        "parted losses": float((losses - want).abs().max()),
        "decode": str(model.export(folder / "decode")),
    }


def _behind_a_prefix() -> float:
    """Return what the loss behind a prefix, whose place in the cache a dry run measures, differs by."""
    rule = peftfx.PrefixTuning(num_virtual_tokens=3)
    one, model = (peftfx.transform(llama(), rule, seed=0) for _ in range(2))
    ids, engine = _half(_batches()[0]), _engine(model, 3)
    return float(engine(input_ids=ids, labels=ids).loss - one(input_ids=ids, labels=ids).loss)


def _ranks_are_counted(stage: int) -> str:
    """Return what AdaLoRA says after a backward."""
    model = peftfx.transform(llama(), BUDGET, seed=0)
    engine, ids = _engine(model, stage), _half(_batches()[0])
    engine.backward(engine(input_ids=ids, labels=ids).loss)
    return message(lambda: model.update_and_allocate(0))


def _losses(engine: Any) -> Tensor:
    """Train with each process's half of the batches, and return the loss of each step, averaged over the processes."""
    losses = []
    for batch in _batches():
        loss = engine(input_ids=_half(batch), labels=_half(batch)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.detach())
    return mean_of_all(torch.stack(losses))


def _half(batch: Tensor) -> Tensor:
    return batch[2 * dist.get_rank() : 2 * dist.get_rank() + 2]


def _engine(model: peftfx.AdaptedModel, stage: int) -> Any:
    import deepspeed

    return deepspeed.initialize(model=model, optimizer=_sgd(model), config=_config(stage), dist_init_required=False)[0]


def _config(stage: int) -> dict[str, object]:
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _sgd(model: peftfx.AdaptedModel) -> torch.optim.Optimizer:
    """Adam would make steps of what is zero but for rounding."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)


def _batches() -> Tensor:
    return torch.randint(3, 64, (3, 4, 10), generator=torch.Generator().manual_seed(1))


def _step(model: peftfx.AdaptedModel, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    loss: Tensor = model.train()(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()
