"""A language model as the demo needs it: trained in a plain loop, its perplexity, its continuations, timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from peftfx.caches.cache import held
from peftfx.demo.bar import training_bar
from peftfx.model.adapted import AdaptedModel

FINE_TUNE_BATCH, WARM_UP = 2, 3


def fine_tune(adapted: AdaptedModel, rate: float, windows: Tensor) -> float:
    """A plain loop: AdamW on what requires a gradient, warm-up, linear decay; a bar. Returns seconds for a step."""
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    batches = windows.split(FINE_TUNE_BATCH)
    decay = len(batches) + 1
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / WARM_UP, 1 - s / decay))
    seconds = []
    adapted.train()
    with training_bar(len(batches)) as told:
        for ids in batches:
            start = time.perf_counter()
            loss = adapted(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            seconds.append(time.perf_counter() - start)
            told(loss.item())
    adapted.eval()
    return median(seconds)  # the first step also captures the training graph


@torch.no_grad()
def start_from_text(adapted: AdaptedModel, tokens: Tensor) -> None:
    """Start a prefix as the keys and values of a text: from a random one a few steps lead nowhere."""
    past = held(adapted.base(input_ids=tokens[None], use_cache=True).cache)
    (prefix,) = (t for _, t in adapted.adapter("default").tensors())
    prefix.copy_(torch.cat(past).permute(2, 0, 1, 3).reshape(prefix.shape))


@torch.no_grad()
def perplexity(logits: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    """The exponential of the mean loss of every token of the windows but the first, each after what is before it."""
    total = 0.0
    for ids in windows.split(FINE_TUNE_BATCH):
        shown = logits(ids)[:, -ids.shape[1] : -1]  # ahead of the text there may be virtual tokens
        total += float(nn.functional.cross_entropy(shown.transpose(1, 2), ids[:, 1:], reduction="sum"))
    return math.exp(total / windows[:, 1:].numel())


def continue_prompt(served: Any, prompt: Tensor, count: int) -> tuple[Tensor, float]:
    """A greedy continuation of this many tokens, prompt included, and how many tokens a second come after the first."""
    options: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(prompt)}
    seconds = []
    for length in (1, 1, count):  # the first run of all is not what a run takes
        start = time.perf_counter()
        tokens = served.generate(prompt, min_new_tokens=length, max_new_tokens=length, **options)
        seconds.append(time.perf_counter() - start)
    return tokens, (count - 1) / (seconds[2] - seconds[1])
