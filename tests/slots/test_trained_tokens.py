"""Trained rows of tokens and whole trained embeddings, chosen by row and put into slots, held against `peft`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor

import peftfx
from peftfx import PeftfxError, runtime
from peftfx.options import DECODE, FORWARD

LLAMA = hf.LlamaConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
RULES: dict[str, dict[str, Any]] = {
    "few": {"trainable_token_indices": [38, 39]},
    "more": {"trainable_token_indices": [5, 9, 30], "use_dora": True},
    "whole": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "table": {"modules_to_save": ["embed_tokens"]},
    "none": {},
}
IDS = torch.tensor([[3, 38, 5, 39, 9, 1, 38]])


@dataclasses.dataclass(frozen=True)
class Trained:
    """A base, and a directory of `peft` for each of `RULES`."""

    base: hf.LlamaForCausalLM
    home: Path

    def wants(self, name: str | None, ids: Tensor) -> Tensor:
        """The logits of `peft`'s own model."""
        plain = hf.LlamaForCausalLM.from_pretrained(self.home / "base")
        model = plain if name is None else peft.PeftModel.from_pretrained(plain, self.home / name)
        with torch.no_grad():
            return model.eval()(input_ids=ids).logits

    def ours(self, *names: str) -> peftfx.model.adapted.AdaptedModel:
        adapted = peftfx.load(hf.LlamaForCausalLM.from_pretrained(self.home / "base"), self.home / names[0], names[0])
        for name in names[1:]:
            adapted.load_adapter(self.home / name, name)
        return adapted


@pytest.fixture(
    scope="module",
    params=[pytest.param(True, id="tied"), pytest.param(False, id="untied", marks=pytest.mark.further)],
)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    home, config = (
        tmp_path_factory.mktemp("tokens"),
        hf.LlamaConfig(**{**LLAMA.to_dict(), "tie_word_embeddings": request.param}),
    )
    torch.manual_seed(0)
    hf.LlamaForCausalLM(config).save_pretrained(home / "base")
    for name, more in RULES.items():
        base = hf.LlamaForCausalLM.from_pretrained(home / "base")
        options = {"r": 3, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(base, peft.LoraConfig(**options, **more))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(home / name)
    return Trained(hf.LlamaForCausalLM.from_pretrained(home / "base"), home)


@pytest.mark.parametrize("view", [pytest.param(FORWARD, marks=pytest.mark.further), DECODE])
def test_each_row_has_its_own(view: str, trained: Trained, tmp_path: Path) -> None:
    trained.ours(*RULES).export(tmp_path / "out", view=view, batched=list(RULES))
    served = runtime.load(tmp_path / "out")
    names = [*RULES, None]
    ids = IDS.expand(len(names), -1)
    got = served(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_ids=served.adapter_ids(names)).logits
    for row, name in zip(got, names, strict=True):
        torch.testing.assert_close(row[None], trained.wants(name, IDS), atol=1e-4, rtol=1e-4, msg=str(name))


@pytest.mark.further
def test_rows_of_tokens_are_put_into_slots_of_embedding_and_head(trained: Trained, tmp_path: Path) -> None:
    slots = "all-linear | embedding.token | head"
    peftfx.export_onnx(trained.base, tmp_path / "graph", view=DECODE, slots=slots)
    served, ids = runtime.load(tmp_path / "graph"), IDS.expand(2, -1)
    for name in ("few", "more"):
        path = peftfx.export_adapter(trained.ours(name), tmp_path / "graph", tmp_path / name)
        served.load_adapter(path, name)
        served.set_adapter(name)
        got = served(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(got[:1], trained.wants(name, IDS), atol=1e-4, rtol=1e-4)
    peftfx.export_onnx(trained.base, tmp_path / "linear", view=DECODE, slots="all-linear")
    with pytest.raises(PeftfxError, match=r"no place for a low-rank sum at model\.embed_tokens"):
        peftfx.export_adapter(trained.ours("few"), tmp_path / "linear", tmp_path / "none")


@pytest.mark.further
def test_two_adapters_train_rows_of_one_table(trained: Trained, tmp_path: Path) -> None:
    adapted = trained.ours("few", "more")
    adapted.set_adapter(["few", "more"])
    with torch.no_grad():
        want = adapted(input_ids=IDS).logits
    adapted.export(tmp_path / "out", view=FORWARD)
    got = runtime.load(tmp_path / "out")(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    peftfx.export_onnx(trained.base, tmp_path / "graph", view=FORWARD, slots="all-linear | embedding.token | head")
    peftfx.export_adapter(adapted, tmp_path / "graph", tmp_path / "both")  # verified as it is written


@pytest.mark.parametrize(
    "more",
    [{}, {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}, {"trainable_token_indices": [3, 38]}],
    ids=str,
)
def test_rows_have_the_embeddings_of_their_files(more: dict[str, Any], trained: Trained, tmp_path: Path) -> None:
    """Each adapter was trained on a base with an embedding of its own, which its file has; a tied head has it, too."""
    wants: dict[str | None, Tensor] = {None: trained.wants(None, IDS)}
    for seed, name in enumerate(("one", "two")):
        base = hf.LlamaForCausalLM.from_pretrained(trained.home / "base")
        torch.manual_seed(seed)
        with torch.no_grad():
            base.get_input_embeddings().weight[3:9].normal_()
        options = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM", **more}
        model = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
        model.save_pretrained(tmp_path / name, save_embedding_layers=True)
        with torch.no_grad():
            wants[name] = model(input_ids=IDS).logits
    adapted = peftfx.load(trained.base, tmp_path / "one", "one")
    adapted.load_adapter(tmp_path / "two", "two")
    adapted.export(tmp_path / "out", view=FORWARD, batched=["one", "two"])
    adapted.remove()
    served, names = runtime.load(tmp_path / "out"), ["two", None, "one"]
    ids = IDS.expand(len(names), -1)
    got = served(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_ids=names).logits
    for row, name in zip(got, names, strict=True):
        torch.testing.assert_close(row[None], wants[name], atol=1e-4, rtol=1e-4, msg=str(name))
