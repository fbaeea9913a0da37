"""A HF PEFT config object adapts the modules that `peft` adapts with it: the same keys, shapes and counts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.adapted import randomise
from support.adapter_files import load_peft, same
from support.zoo import TOKENS
from torch import Tensor, nn

import peftfx
from peftfx import LoRA, PeftfxError, TrainableTokens
from peftfx.model.api import bare

pytestmark = pytest.mark.further

SIZES = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
GPT2 = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
OPT = {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48}
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MODELS: Mapping[str, tuple[Callable[[], nn.Module], str]] = {
    "bert classifier": (lambda: hf.BertForSequenceClassification(hf.BertConfig(**SIZES, num_labels=3)), "SEQ_CLS"),
    "roberta classifier": (
        lambda: hf.RobertaForSequenceClassification(hf.RobertaConfig(**SIZES, num_labels=3)),
        "SEQ_CLS",
    ),
    "bert tokens": (lambda: hf.BertForTokenClassification(hf.BertConfig(**SIZES, num_labels=3)), "TOKEN_CLS"),
    "bert answers": (lambda: hf.BertForQuestionAnswering(hf.BertConfig(**SIZES)), "QUESTION_ANS"),
    "gpt2 classifier": (lambda: hf.GPT2ForSequenceClassification(hf.GPT2Config(**GPT2)), "SEQ_CLS"),
    "llama classifier": (
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**SIZES, num_key_value_heads=2)),
        "SEQ_CLS",
    ),
    "opt": (lambda: hf.OPTForCausalLM(hf.OPTConfig(**OPT, word_embed_proj_dim=32)), "CAUSAL_LM"),
    "gpt2": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), "CAUSAL_LM"),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2)), "CAUSAL_LM"),
    "t5": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5, decoder_start_token_id=0)), "SEQ_2_SEQ_LM"),
}
CONFIGS: Mapping[str, Callable[[str], peft.PeftConfig]] = {
    "lora": lambda task: peft.LoraConfig(task_type=task, r=4),
    "all-linear": lambda task: peft.LoraConfig(task_type=task, r=4, target_modules="all-linear"),
    "adalora": lambda task: peft.AdaLoraConfig(task_type=task, init_r=4, total_step=20, tinit=2, tfinal=2),
    "ia3": lambda task: peft.IA3Config(task_type=task),
    "vera": lambda task: peft.VeraConfig(task_type=task, r=4, save_projection=False),
    "ln_tuning": lambda task: peft.LNTuningConfig(task_type=task),
    "adaption": lambda task: peft.AdaptionPromptConfig(task_type=task, adapter_len=3, adapter_layers=1),
    "prompt": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "prefix": lambda task: peft.PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    "p-tuning": lambda task: peft.PromptEncoderConfig(task_type=task, num_virtual_tokens=3, encoder_hidden_size=8),
}
REFUSED = {
    *((name, "ln_tuning") for name in ("bert classifier", "roberta classifier", "bert tokens", "bert answers", "opt")),
    *((name, "adaption") for name in MODELS if name.partition(" ")[0] in ("bert", "roberta", "opt", "t5")),
    *((name, "all-linear") for name in ("bert tokens", "bert answers")),
}
"""What `peft` has no table entry for, and all-linear beside a head, which it adapts and then cannot save whole."""


class Plain(nn.Module):
    """Layers that are told by nothing but their class."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.second(torch.relu(self.first(x)))))


def shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    return {key: tuple(t.shape) for key, t in load_file(directory / "adapter_model.safetensors").items()}


@pytest.mark.parametrize("name", MODELS)
def test_a_config_adapts_the_modules_that_peft_adapts(name: str, tmp_path: Path) -> None:
    make, task = MODELS[name]
    base = make().eval()
    ours = bare(base)
    for method, config in CONFIGS.items():
        if (name, method) in REFUSED:
            with pytest.raises((ValueError, TypeError)):
                peft.get_peft_model(copy.deepcopy(base), config(task))
            continue
        theirs = peft.get_peft_model(copy.deepcopy(base), config(task))
        ours.add_adapter("x", config(task))
        assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0], method
        theirs.save_pretrained(tmp_path / "theirs" / method)
        ours.save_pretrained(tmp_path / "ours" / method)
        assert shapes(tmp_path / "ours" / method) == shapes(tmp_path / "theirs" / method), method
        ours.remove("x")


def test_all_linear_is_every_linear_of_a_module_of_no_library(tmp_path: Path) -> None:
    base, config = Plain(), peft.LoraConfig(r=4, target_modules="all-linear")
    theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config))
    theirs.save_pretrained(tmp_path / "theirs")
    peftfx.transform(base, config, inputs={"x": torch.randn(2, 8)}).save_pretrained(tmp_path / "ours")
    assert shapes(tmp_path / "ours") == shapes(tmp_path / "theirs")


def test_what_a_config_says_of_the_task_is_saved(tmp_path: Path) -> None:
    make, task = MODELS["bert classifier"]
    base = make().eval()
    peftfx.transform(base, peft.LoraConfig(task_type=task, r=4)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == task
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path))
    assert type(theirs) is peft.PeftModelForSequenceClassification


def test_modules_to_save_names_ends_of_paths_as_in_peft() -> None:
    with pytest.raises(PeftfxError, match="no module is named sore"):
        peftfx.transform(Plain(), LoRA(target="first", modules_to_save=["sore"]), inputs={"x": torch.randn(2, 8)})
    adapted = peftfx.transform(
        Plain(), LoRA(target_modules=["first"], modules_to_save=["cond"]), inputs={"x": torch.randn(2, 8)}
    )
    theirs = peft.get_peft_model(Plain(), peft.LoraConfig(target_modules=["first"], modules_to_save=["cond"]))
    assert adapted.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0]


class Tied(nn.Module):
    """A head that reads the embedding's own parameter, and no config that says so."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.mix, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.words(ids))))


IDS = torch.tensor([[0, 3, 5, 8]])
TOKEN_CONFIGS = {
    "tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 5], target_modules=["words"]),
    "lora": lambda: peft.LoraConfig(r=2, target_modules=["mix"], trainable_token_indices={"words": [3, 5]}),
}
TOKEN_RULES = {
    "tokens": lambda: TrainableTokens(token_indices=[3, 5], target_modules=["words"]),
    "lora": lambda: LoRA(r=2, target_modules=["mix"], trainable_token_indices={"words": [3, 5]}),
}


@pytest.mark.parametrize("kind", TOKEN_CONFIGS)
@torch.no_grad()
def test_the_rows_are_those_of_the_module_that_is_named(kind: str, tmp_path: Path) -> None:
    theirs = peft.get_peft_model(Tied(), TOKEN_CONFIGS[kind]())
    randomise(theirs)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    want = theirs(IDS)
    ours = peftfx.load(Tied().eval(), tmp_path / "theirs", inputs={"ids": IDS})
    same(ours(ids=IDS), want)
    ours.save_pretrained(tmp_path / "ours")
    same(load_peft(Tied(), tmp_path / "ours")(IDS), want)
    ours.export(tmp_path / "out")
    (got,) = peftfx.runtime.load(tmp_path / "out")(ids=IDS).values()
    same(torch.as_tensor(got), want)
    ours.merge()
    same(ours.remove()(IDS), want)


@pytest.mark.parametrize("kind", TOKEN_RULES)
@torch.no_grad()
def test_a_new_rule_trains_the_same_and_peft_reads_it(kind: str, tmp_path: Path) -> None:
    ours = peftfx.transform(Tied().eval(), TOKEN_RULES[kind](), inputs={"ids": IDS})
    randomise(ours.adapters)
    ours.save_pretrained(tmp_path)
    same(load_peft(Tied(), tmp_path)(IDS), ours(ids=IDS))
