"""The demo's language model: trained in a plain loop, with its perplexity and its timed continuations."""

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
    """Train in a plain loop with a bar: AdamW, warm-up, linear decay. Return the seconds for a step."""
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
    """Initialise a prefix with the keys and values of a text. A random prefix needs more than a few steps."""
    past = held(adapted.base(input_ids=tokens[None], use_cache=True).cache)
    (prefix,) = (t for _, t in adapted.adapter("default").tensors())
    prefix.copy_(torch.cat(past).permute(2, 0, 1, 3).reshape(prefix.shape))


@torch.no_grad()
def perplexity(logits: Callable[[Tensor], Tensor], windows: Tensor) -> float:
    """Compute the exponential of the mean loss over all tokens of the windows except each window's first."""
    total = 0.0
    for ids in windows.split(FINE_TUNE_BATCH):
        shown = logits(ids)[:, -ids.shape[1] : -1]  # virtual tokens may come before the text
        total += float(nn.functional.cross_entropy(shown.transpose(1, 2), ids[:, 1:], reduction="sum"))
    return math.exp(total / windows[:, 1:].numel())


def continue_prompt(served: Any, prompt: Tensor, count: int) -> tuple[Tensor, float]:
    """Generate `count` tokens greedily. Return them with the prompt, and the tokens per second after the first."""
    options: dict[str, Any] = {"do_sample": False, "attention_mask": torch.ones_like(prompt)}
    seconds = []
    for length in (1, 1, count):  # the very first run is slower, and not measured
        start = time.perf_counter()
        tokens = served.generate(prompt, min_new_tokens=length, max_new_tokens=length, **options)
        seconds.append(time.perf_counter() - start)
    return tokens, (count - 1) / (seconds[2] - seconds[1])
