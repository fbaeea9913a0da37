"""The demo's sentence classifier: trained in a plain loop, run in torch and in ONNX Runtime, and timed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from peftfx.demo.bar import training_bar
from peftfx.demo.topics import Example, Split, batches
from peftfx.model.adapted import AdaptedModel
from peftfx.serving.onnx_model import OnnxModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH, LEARNING_RATE, MAX_TOKENS, WARMUP = 16, 1e-3, 64, 10


@dataclass(frozen=True)
class Classifier:
    """A model in torch or in ONNX Runtime, as a function from sentences to logits."""

    tokenizer: PreTrainedTokenizerBase
    run: Callable[[dict[str, Tensor]], Tensor]

    def logits(self, examples: Sequence[str]) -> Tensor:
        """Compute the logits [sentences, topics], one batch at a time."""
        chunks = [examples[i : i + 2 * _BATCH] for i in range(0, len(examples), 2 * _BATCH)]
        return torch.cat([self.run(encode(self.tokenizer, chunk)) for chunk in chunks])


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> dict[str, Tensor]:
    """Make token tensors [sentences, longest sentence]. Batches may differ in length without a new capture."""
    return dict(tokenizer(list(texts), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"))


def train_classifier(
    adapted: AdaptedModel, tokenizer: PreTrainedTokenizerBase, split: Split, epochs: int, seed: int
) -> tuple[int, float]:
    """Train in a plain loop: AdamW, warm-up, linear decay. Return the number of steps and seconds per step."""
    rng = random.Random(seed)
    total = epochs * len(batches(split.train, _BATCH))
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min((s + 1) / WARMUP, 1 - s / total))
    times: list[float] = []
    adapted.train()
    with training_bar(total) as told:
        for batch in (b for _ in range(epochs) for b in batches(split.train, _BATCH, rng)):
            begun = time.perf_counter()
            loss = adapted(**encode(tokenizer, [e.text for e in batch]), labels=_labels(batch)).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            times.append(time.perf_counter() - begun)
            told(loss.item())
    return total, median(times)  # the first step also captures the training graph


def _labels(batch: Sequence[Example]) -> Tensor:
    return torch.tensor([e.label for e in batch])


def evaluate_classifier(adapted: AdaptedModel, classifier: Classifier, texts: Sequence[str]) -> Tensor:
    adapted.eval()
    with torch.no_grad():
        return classifier.logits(texts)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(-1) == labels).float().mean())


def latency(models: Sequence[OnnxModel], tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[float]:
    """Measure the median milliseconds for a sentence over 60 calls. The models take turns, for equal conditions."""
    feeds = [encode(tokenizer, [text]) for text in texts[:: max(1, len(texts) // 20)]]
    times: list[list[float]] = [[] for _ in models]
    for feed in feeds[:20] * 3:
        for model, own in zip(models, times, strict=True):
            start = time.perf_counter()
            model(**feed)
            own.append(1000 * (time.perf_counter() - start))
    return [median(own) for own in times]
