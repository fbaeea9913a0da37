"""ChatGLM3 as diffusers has it whole (Kolors' text encoder), with its own output layer: a causal language model.

Its traps: tensors are [sequence, batch, ...] inside, rotations a torch.jit script, keys and values shared by groups of
heads, and fused projections throughout; `attention_mask` sends it where it branches on values, so that a padded call
passes the [batch, 1, sequence, sequence] mask of what is *not* seen.
"""

from __future__ import annotations

import torch
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput


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
