"""The zoo: tiny random models of many architectures, built in seconds and without a network."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import diffusers
import torch
import transformers as hf
from torch import Tensor, nn

from peftfx.bases.example_inputs import example_inputs
from peftfx.graph.graph import Graph

TOKENS: Mapping[str, int] = {"vocab_size": 99, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 3}
_SIZES: Mapping[str, int] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_DECODER = {**TOKENS, **_SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
_ENCODER = {**_DECODER, "num_labels": 3, "problem_type": "single_label_classification"}
_IMAGE = {**_SIZES, "intermediate_size": 48, "image_size": 32, "patch_size": 8, "num_labels": 3}


@dataclass(frozen=True)
class Entry:
    """A model of the zoo.

    Attributes:
        name: in `ZOO`.
        task: by transformers' names.
        make: an untouched model, of whatever random weights.
        custom: makes its inputs, where they cannot be made from a config.
    """

    name: str
    task: str
    make: Callable[[], nn.Module] = field(repr=False)
    custom: Callable[[int, int, torch.Generator], dict[str, Tensor]] | None = field(default=None, repr=False)

    def build(self) -> nn.Module:
        """The model in eval mode. Every parameter is off its initial value: no bias is 0 and no scale 1."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.make()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.is_floating_point():
                        parameter.add_(torch.randn_like(parameter) * 0.05)
        return model.eval()

    def inputs(
        self, batch: int = 2, sequence: int = 7, seed: int = 0, *, model: nn.Module | None = None, labels: bool = False
    ) -> dict[str, Tensor]:
        """Keyword arguments of a call; a model at hand saves building one to read its config."""
        if self.custom is not None:
            return self.custom(batch, sequence, torch.Generator().manual_seed(seed))
        sizes = {"batch": batch, "sequence": sequence, "decoder_sequence": max(1, sequence - 2)}
        return example_inputs(model or self.make(), self.task, sizes=sizes, seed=seed, labels=labels)


@dataclass(frozen=True)
class Captured:
    """A model of the zoo and the graph of its forward view. Shared by tests: neither may be changed."""

    entry: Entry
    model: nn.Module
    graph: Graph


class Custom(nn.Module):
    """A model like no library's: a convolution over tokens, attention spelled out, a gated feed-forward, two heads."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(99, 32)
        self.mix = nn.Conv1d(32, 32, 3, padding=1)
        self.a, self.b, self.c, self.d = (nn.Linear(32, 32) for _ in range(4))
        self.up, self.side, self.down = nn.Linear(32, 48), nn.Linear(32, 48, bias=False), nn.Linear(48, 32)
        self.before, self.after = nn.LayerNorm(32), nn.LayerNorm(32)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(32, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.words(ids)
        x = x + self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = x + self.d(self._attend(self.before(x), mask))
        y = self.after(x)
        x = x + self.down(nn.functional.silu(self.side(y)) * self.up(y))
        return self.out(self.drop(x))

    def _attend(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (f(x).unflatten(-1, (4, 8)).transpose(1, 2) for f in (self.a, self.b, self.c))
        scores = query @ key.transpose(-1, -2) / math.sqrt(8)
        scores = scores.masked_fill(~mask.bool()[:, None, None, :], float("-inf"))
        return (self.drop(scores.softmax(-1)) @ value).transpose(1, 2).flatten(2)


def _custom_inputs(batch: int, sequence: int, random: torch.Generator) -> dict[str, Tensor]:
    mask = torch.ones(batch, sequence, dtype=torch.long)
    mask[-1, max(1, sequence - 2) :] = 0
    return {"ids": torch.randint(99, (batch, sequence), generator=random), "mask": mask}


def _unet() -> nn.Module:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def _unet_inputs(batch: int, sequence: int, random: torch.Generator) -> dict[str, Tensor]:
    return {
        "sample": torch.randn(batch, 4, 8, 8, generator=random),
        "timestep": torch.randint(1000, (batch,), generator=random),
        "encoder_hidden_states": torch.randn(batch, sequence, 24, generator=random),
    }


def _blip2() -> nn.Module:
    return hf.Blip2ForConditionalGeneration(
        hf.Blip2Config(
            vision_config=_IMAGE,
            qformer_config={**_ENCODER, "encoder_hidden_size": 32, "cross_attention_frequency": 1},
            text_config={**_DECODER, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32},
            num_query_tokens=4,
            image_token_index=98,
        )
    )


def _clip() -> nn.Module:
    return hf.CLIPModel(hf.CLIPConfig(text_config=_DECODER, vision_config=_IMAGE, projection_dim=24))


def _whisper() -> nn.Module:
    return hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            **TOKENS,
            d_model=32,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            decoder_start_token_id=4,
            begin_suppress_tokens=None,
        )
    )


def _model(name: str, task: str, config: str, maker: str, **fields: object) -> Entry:
    return Entry(name, task, lambda: getattr(hf, maker)(getattr(hf, config)(**fields)))


def _causal(name: str, stem: str, maker: str = "", **fields: object) -> Entry:
    return _model(name, "text-generation", f"{stem}Config", maker or f"{stem}ForCausalLM", **fields)


def _classifier(name: str, stem: str, **fields: object) -> Entry:
    return _model(name, "text-classification", f"{stem}Config", f"{stem}ForSequenceClassification", **fields)


def _picture(name: str, stem: str, **fields: object) -> Entry:
    return _model(name, "image-classification", f"{stem}Config", f"{stem}ForImageClassification", **fields)


_GPT = {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_GQA = {**_DECODER, "num_key_value_heads": 2}
_DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}

_ENTRIES = (
    _causal("gpt2", "GPT2", "GPT2LMHeadModel", **_GPT),
    _causal("bloom", "Bloom", **TOKENS, hidden_size=32, n_layer=2, n_head=4),
    _causal("opt", "OPT", **_DECODER, ffn_dim=48, word_embed_proj_dim=32),
    _causal(
        "gpt_neo",
        "GPTNeo",
        **TOKENS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        max_position_embeddings=64,
    ),
    _causal("gpt_j", "GPTJ", **_GPT, rotary_dim=4),
    _causal("gpt_neox", "GPTNeoX", **_DECODER, rotary_pct=0.5),
    _causal("llama", "Llama", **_GQA),
    _causal("glm", "Glm", **_GQA, head_dim=8),
    _model(
        "t5",
        "text2text-generation",
        "T5Config",
        "T5ForConditionalGeneration",
        **TOKENS,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        decoder_start_token_id=1,
    ),
    _model(
        "bart",
        "text2text-generation",
        "BartConfig",
        "BartForConditionalGeneration",
        **TOKENS,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        max_position_embeddings=64,
        decoder_start_token_id=3,
        forced_eos_token_id=None,
    ),
    _classifier("bert", "Bert", **_ENCODER),
    _classifier("roberta", "Roberta", **{**_ENCODER, "type_vocab_size": 1}),
    _classifier("deberta", "Deberta", **_ENCODER, **_DISENTANGLED),
    _classifier("deberta_v2", "DebertaV2", **_ENCODER, **_DISENTANGLED, position_buckets=8, norm_rel_ebd="layer_norm"),
    _picture("vit", "ViT", **_IMAGE),
    _picture(
        "swin",
        "Swin",
        image_size=32,
        patch_size=4,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        num_labels=3,
    ),
    _model(
        "segformer",
        "image-segmentation",
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        num_encoder_blocks=2,
        depths=[1, 1],
        sr_ratios=[2, 1],
        hidden_sizes=[16, 32],
        patch_sizes=[7, 3],
        strides=[4, 2],
        num_attention_heads=[2, 4],
        mlp_ratios=[2, 2],
        decoder_hidden_size=32,
        num_labels=3,
        image_size=32,
    ),
    Entry("blip2", "image-text-to-text", _blip2),
    Entry("unet", "text-to-image", _unet, _unet_inputs),
    _causal("qwen2", "Qwen2", **_GQA),
    _causal("mistral", "Mistral", **_GQA, sliding_window=4),
    _causal("gemma", "Gemma", **_GQA, head_dim=8),
    _causal("phi", "Phi", **_DECODER),
    _causal("falcon", "Falcon", **_DECODER, new_decoder_architecture=False, multi_query=True),
    _causal("mpt", "Mpt", **TOKENS, d_model=32, n_heads=4, n_layers=2, max_seq_len=64, expansion_ratio=2),
    _model(
        "distilbert",
        "question-answering",
        "DistilBertConfig",
        "DistilBertForQuestionAnswering",
        **{**TOKENS, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 64},
    ),
    _model(
        "electra",
        "token-classification",
        "ElectraConfig",
        "ElectraForTokenClassification",
        **_ENCODER,
        embedding_size=16,
    ),
    _model("albert", "fill-mask", "AlbertConfig", "AlbertForMaskedLM", **_DECODER, embedding_size=16),
    _model("dinov2", "feature-extraction", "Dinov2Config", "Dinov2Model", **_IMAGE, mlp_ratio=2),
    Entry("clip", "feature-extraction", _clip),
    Entry("whisper", "automatic-speech-recognition", _whisper),
    _causal("gemma2", "Gemma2", **_GQA, head_dim=8, sliding_window=4),
    _causal("qwen3", "Qwen3", **_GQA, head_dim=8),
    _causal("phi3", "Phi3", **_GQA),
    _picture("convnext", "ConvNext", hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, image_size=32, num_labels=3),
    Entry("custom", "custom", Custom, _custom_inputs),
)

ZOO: Mapping[str, Entry] = {entry.name: entry for entry in _ENTRIES}
