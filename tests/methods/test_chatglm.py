"""ChatGLM3 by the full implementation that diffusers has: its fused projections, its mask, its shared keys.

That is Kolors' text encoder, here with its own output layer: a causal language model. Its traps: tensors are
[sequence, batch, ...] inside, rotations a torch.jit script, keys and values shared by groups of heads, and fused
projections throughout; `attention_mask` sends it where it branches on values, so that a padded call passes the
[batch, 1, sequence, sequence] mask of what is *not* seen.
"""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from support.adapted import randomise
from support.parity import UNSEEN
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

import peftfx
from peftfx.export import OnnxModel

pytestmark = pytest.mark.further

FUSED = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h", "word_embeddings"]
ROWS = {True: {"query": 32, "key": 16, "value": 16}, False: {"query": 32, "key": 32, "value": 32}}


class ChatGLM(ChatGLMModel):
    """The model's own layers, called as a causal language model."""

    def forward(
        self,
        input_ids: Tensor,
        full_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        **options: object,
    ) -> CausalLMOutput:
        """Logits, and the loss of the next token."""
        found = super().forward(
            input_ids, full_attention_mask=full_attention_mask, use_cache=False, return_dict=True, **options
        )
        logits = self.output_layer(found.last_hidden_state).transpose(0, 1)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


def chatglm(**fields: object) -> ChatGLM:
    """A tiny one, every weight off its initial value."""
    small = {"num_layers": 2, "padded_vocab_size": 99, "hidden_size": 32, "ffn_hidden_size": 48, "seq_length": 64}
    heads = {"num_attention_heads": 4, "kv_channels": 8, "multi_query_attention": True, "multi_query_group_num": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = ChatGLM(
            ChatGLMConfig(**{**small, **heads, "add_qkv_bias": True, "original_rope": True, **fields}), empty_init=False
        )
        for name, parameter in model.named_parameters():  # its norms are left as memory has them
            start = torch.ones_like(parameter) if "norm" in name else parameter.data
            parameter.data.copy_(start + torch.randn_like(parameter) * 0.05)
    return model.eval()


def inputs(batch: int, sequence: int, seed: int = 0, *, padded: bool = False) -> dict[str, Tensor]:
    """A call; padded on the left, as ChatGLM's tokenizer pads, where it is."""
    ids = torch.randint(5, 99, (batch, sequence), generator=torch.Generator().manual_seed(seed))
    if not padded:
        return {"input_ids": ids}
    seen = torch.ones(batch, sequence)
    seen[-1, :2] = 0
    return {"input_ids": ids, "full_attention_mask": ChatGLM.get_masks(None, ids, None, seen)}


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    assert float((got - want).detach().abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


@pytest.mark.parametrize("grouped", [True, False], ids=["grouped heads", "interleaved heads"])
def test_the_rows_of_its_fused_projections_are_found(grouped: bool) -> None:
    sites = peftfx.inspect(chatglm(multi_query_attention=grouped), inputs=inputs(2, 7))
    (first, _) = (site for site in sites if site.role == "attention.qkv")
    rows = {part.role.partition(".")[2]: sum(end - start for start, end in part.rows) for part in first.parts}
    assert rows == ROWS[grouped]
    assert [s.role for s in sites if s.layer == 0 and s.kind == "linear"] == [
        *("attention.qkv", "attention.output", "mlp.gate_up", "mlp.down")
    ]


@pytest.mark.parametrize("padded", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "padded"])
def test_a_lora_of_peft_is_served_as_peft_computes_it(padded: bool, tmp_path: Path) -> None:
    base = chatglm()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=FUSED, r=4, lora_alpha=6)).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    adapted = peftfx.load(base, tmp_path / "adapter", inputs=inputs(2, 7, padded=padded))
    report = adapted.export(tmp_path / "out", view="forward")
    assert len(report.merged) == 9
    served = OnnxModel(tmp_path / "out")
    for batch, sequence in UNSEEN:
        call = inputs(batch, sequence, 3, padded=padded)
        seen = torch.ones(batch, sequence, dtype=torch.bool)
        seen[-1, : 2 * padded] = False
        with torch.no_grad():
            want = theirs(**call).logits
        close(adapted(**call).logits, want, 1e-5)
        close(served(**call)["logits"][seen], want[seen], 1e-4)


def test_a_rule_on_the_query_reaches_the_rows_of_the_query(tmp_path: Path) -> None:
    base = chatglm()
    adapted = peftfx.transform(base, peftfx.LoRA(r=3, target="attention.query"), inputs=inputs(2, 7), seed=0)
    randomise(adapted)
    before = base.encoder.layers[0].self_attention.query_key_value.weight.detach().clone()
    adapted.save_pretrained(tmp_path)
    call = inputs(3, 5, 3)
    want = adapted.eval()(**call).logits
    again = peft.PeftModel.from_pretrained(copy.deepcopy(chatglm()), str(tmp_path)).eval()
    close(again(**call).logits, want, 1e-5)
    adapted.merge()
    moved = (base.encoder.layers[0].self_attention.query_key_value.weight - before).abs().sum(1) > 0
    assert moved[:32].all()
    assert not moved[32:].any()
    close(adapted.remove()(**call).logits, want, 1e-5)


@pytest.mark.parametrize(
    "rule",
    [
        peftfx.PromptTuning(num_virtual_tokens=4),
        pytest.param(peftfx.PTuning(num_virtual_tokens=4), marks=pytest.mark.slow),
    ],
)
def test_virtual_tokens_are_what_the_model_computes_behind_their_embeddings(
    rule: peftfx.PromptTuning, tmp_path: Path
) -> None:
    """peft cannot: the model's code reads sizes off the ids that peft does not pass."""
    base = chatglm()
    adapted = peftfx.transform(base, rule, inputs=inputs(2, 7), seed=0)
    randomise(adapted)
    method = adapted.adapter("default").placements[0].method
    prompt = method.virtual(adapted.adapter("default").params(adapted.adapter("default").placements[0]), False)
    adapted.eval().export(tmp_path / "out", view="forward")
    served = OnnxModel(tmp_path / "out")
    for batch, sequence in UNSEEN:
        call = inputs(batch, sequence, 3)
        words = base.embedding(call["input_ids"])
        ahead = torch.cat([prompt[:, None].expand(-1, batch, -1), words])
        with torch.no_grad():
            want = base(torch.zeros(batch, 4 + sequence, dtype=torch.long), inputs_embeds=ahead).logits
        close(adapted(**call).logits, want, 1e-5)
        close(served(**call)["logits"], want, 1e-4)


def test_its_plain_mask_serves_padded_and_whole_texts() -> None:
    """The model's code makes a mask of pairs only if the plain one has padding."""
    base, ids = chatglm(), inputs(2, 7)["input_ids"]
    graph = peftfx.capture(base, {"input_ids": ids, "attention_mask": torch.ones(2, 7)})
    padded = torch.ones(2, 7)
    padded[1, :3] = 0
    for mask in (torch.ones(2, 7), padded):
        got, want = graph(input_ids=ids, attention_mask=mask), base(ids, attention_mask=mask)
        close(got.logits[mask != 0], want.logits[mask != 0], 1e-5)  # type: ignore[attr-defined]
