"""The matrix's models: tiny, random and off their initial values, one for each task and architecture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import transformers as hf
from support.zoo import ZOO, Entry
from torch import nn
from transformers.modeling_layers import GenericForTokenClassification

from peftfx.bases.tasks import resolve_task

#: The zoo's name of each architecture.
ARCHITECTURES: Mapping[str, str] = {
    "GPT-2": "gpt2",
    "Bloom": "bloom",
    "OPT": "opt",
    "GPT-Neo": "gpt_neo",
    "GPT-J": "gpt_j",
    "GPT-NeoX-20B": "gpt_neox",
    "LLaMA": "llama",
    "ChatGLM": "glm",
    "T5": "t5",
    "BART": "bart",
    "BERT": "bert",
    "RoBERTa": "roberta",
    "Deberta": "deberta",
    "Deberta-v2": "deberta_v2",
    "Stable Diffusion": "unet",
    "ViT": "vit",
    "Swin": "swin",
    "BLIP-2": "blip2",
    "SegFormer": "segformer",
}
#: The matrix's names of tasks that neither transformers nor its pipelines have.
TASKS: Mapping[str, str] = {"causal-lm": "text-generation", "conditional-generation": "text2text-generation"}


class OPTForTokenClassification(GenericForTokenClassification, hf.OPTPreTrainedModel):
    """What transformers would have, had it one: the backbone and a linear head."""


class GPTJForTokenClassification(GenericForTokenClassification, hf.GPTJPreTrainedModel):
    """Likewise."""


_OWN: Mapping[str, Callable[[object], nn.Module]] = {
    "opt": OPTForTokenClassification,
    "gpt_j": GPTJForTokenClassification,
}
_AUTO = {
    "text-classification": hf.AutoModelForSequenceClassification,
    "token-classification": hf.AutoModelForTokenClassification,
}


def entry(task: str, model: str) -> Entry:
    """A model of the matrix, as the zoo has models."""
    name, wanted = ARCHITECTURES[model], TASKS.get(task) or task.replace("sequence-", "text-")
    wanted = resolve_task(wanted)
    found = ZOO[name]
    if found.task == wanted:
        return found

    def make() -> nn.Module:
        config = found.make().config
        config.num_labels, config.problem_type = 3, "single_label_classification"
        if wanted == "token-classification" and name in _OWN:
            return _OWN[name](config)
        return _AUTO[wanted].from_config(config)

    return dataclasses.replace(found, name=f"{name}_{wanted}", task=wanted, make=make)


def in_transformers(model: nn.Module) -> bool:
    """Whether a library has the model's class, so that a directory says all of it."""
    return type(model).__module__.partition(".")[0] in ("transformers", "diffusers")
