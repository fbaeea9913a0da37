"""Exported models in ONNX Runtime: calls, generation and classification, without a torch model.

model = peftfx.runtime.load("out")
model.generate(**model.tokenizer("Hello", return_tensors="pt"), max_new_tokens=20)
"""

from peftfx.serving.load import load
from peftfx.serving.pipelines import pipeline
from peftfx.serving.sentences import ServedSentences
from peftfx.serving.served import Served

__all__ = ["Served", "ServedSentences", "load", "pipeline"]
