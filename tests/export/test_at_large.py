"""Models that nobody listed: every kind of model that transformers has, at a tiny size, through the same flow.

Slow, and so left out of a default run: `pytest -m slow tests/export/test_at_large.py`. A kind is passed over where no
tiny model can be built from its config alone, where `peft` cannot adapt it, or where torch cannot capture it: the
reason is in the report (`-rs`).
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from support.parity import UNSEEN, outputs, randomise
from torch import Tensor, nn
from transformers.models.auto import modeling_auto as auto

import peftfx
from peftfx import PeftfxError
from peftfx.bases.example_inputs import example_inputs
from peftfx.export import OnnxModel

pytestmark = pytest.mark.slow

SMALL: Mapping[str, object] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size", "d_embed"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "hidden_dim", "ffn_hidden_size"), 48),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "moe_intermediate_size"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv", "attention_head_size"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    "vocab_size": 99,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "num_labels": 3,
    "image_size": 32,
    "patch_size": 8,
    "num_experts_per_tok": 2,
    "decoder_start_token_id": 2,
}
MAPPINGS = {
    "text-generation": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "text-classification": auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "text2text-generation": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "image-classification": auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
}
KINDS = [(task, kind) for task, names in MAPPINGS.items() for kind in sorted(names)]


def tiny(task: str, kind: str) -> nn.Module:
    """A tiny model of this kind, off its initial values."""
    try:
        cls = type(hf.AutoConfig.for_model(kind))
        accepted = set(inspect.signature(cls.__init__).parameters) | set(vars(cls())) | set(cls.attribute_map)
        config = cls(**{k: v for k, v in SMALL.items() if k in accepted})
        name = MAPPINGS[task][kind]
        make = getattr(hf, name if isinstance(name, str) else name[0])
        with torch.device("meta"):
            if sum(p.numel() for p in make(copy.deepcopy(config)).parameters()) > 5_000_000:
                pytest.skip("its config does not say what makes it large")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = make(config)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(torch.randn_like(p) * 0.05)
    except Exception as error:
        pytest.skip(f"no tiny model: {str(error).splitlines()[0] if str(error) else error!r}")
    return model.eval()


@pytest.mark.parametrize(("task", "kind"), KINDS)
def test_a_lora_of_peft_is_served_as_peft_computes_it(task: str, kind: str, tmp_path: Path) -> None:
    model = tiny(task, kind)
    base = copy.deepcopy(model)
    try:
        inputs = [example_inputs(base, task, sizes={"batch": b, "sequence": s}, seed=b) for b, s in UNSEEN]
    except PeftfxError as error:  # anything else that goes wrong here is ours, and a failure
        pytest.skip(f"no example is known: {error.what}")
    try:
        for case in inputs:
            outputs(base, case)
    except Exception as error:
        pytest.skip(f"the tiny model refuses its example: {str(error).splitlines()[0] if str(error) else error!r}")
    try:
        theirs = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=4)).eval()
        randomise(theirs)
        want = [outputs(theirs, case) for case in inputs]
    except Exception as error:
        pytest.skip(f"does not run in peft: {str(error).splitlines()[0] if str(error) else error!r}")
    theirs.save_pretrained(str(tmp_path / "adapter"))
    try:
        adapted = peftfx.load(copy.deepcopy(base), tmp_path / "adapter")
    except PeftfxError as error:
        if "cannot capture" in str(error):
            pytest.skip(f"torch cannot capture it: {error.what}")
        if "experts" in str(error) and "cannot be adapted here" in str(error):
            pytest.skip(f"peft adapts its experts, which run as no grouped product: {error.what}")
        raise
    try:
        adapted.export(tmp_path / "out", view="forward")
    except PeftfxError as error:
        if "code fixes the" in str(error):
            pytest.skip(f"refused: {error.what}")
        raise
    served = OnnxModel(tmp_path / "out")
    for case, expected in zip(inputs, want, strict=True):
        for name, value in served(**{k: v for k, v in case.items() if k in served.inputs}).items():
            compare(value, expected[name], case.get("attention_mask"))


def compare(got: Tensor, want: Tensor, mask: Tensor | None) -> None:
    """Equal to 1e-4 of the largest value, where there is no padding."""
    if mask is not None and want.shape[:2] == mask.shape:
        got, want = got[mask.bool()], want[mask.bool()]
    assert float((got.float() - want.float()).abs().max()) <= 1e-4 * max(1.0, float(want.abs().max()))
