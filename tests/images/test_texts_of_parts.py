"""Example tokens of models that read more than one text, and of models without a vocabulary."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from every_model.checks import build
from support.adapted import randomise

import peftfx
from peftfx.bases.example_inputs import example_inputs
from peftfx.export import OnnxModel

_SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}


def _instruct_blip() -> hf.InstructBlipForConditionalGeneration:
    torch.manual_seed(0)
    words = {"vocab_size": 40, "max_position_embeddings": 64}
    config = hf.InstructBlipConfig(
        vision_config={**_SMALL, "image_size": 16, "patch_size": 8},
        qformer_config={**_SMALL, "vocab_size": 12, "max_position_embeddings": 32, "encoder_hidden_size": 16},
        text_config={**_SMALL, **words, "model_type": "opt", "ffn_dim": 24, "word_embed_proj_dim": 16},
        num_query_tokens=3,
        image_token_index=39,
    )
    return hf.InstructBlipForConditionalGeneration(config).eval()


@pytest.mark.further
def test_a_part_reads_tokens_of_its_own_vocabulary(tmp_path: Path) -> None:
    base = _instruct_blip()
    made = example_inputs(base, sizes={"batch": 3, "sequence": 9})
    assert made["qformer_input_ids"].shape == made["qformer_attention_mask"].shape == (3, 9)
    assert made["qformer_input_ids"].max() < 12
    theirs = peft.get_peft_model(_instruct_blip(), peft.LoraConfig(r=2, target_modules=["query", "q_proj", "fc1"]))
    randomise(theirs)
    theirs.eval().save_pretrained(str(tmp_path / "adapter"))
    adapted = peftfx.load(base, tmp_path / "adapter")
    adapted.export(tmp_path / "out", view="forward")
    with torch.no_grad():
        want = theirs(**made).logits
    got = OnnxModel(tmp_path / "out")(**made)["logits"]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_a_model_without_a_vocabulary_reads_characters() -> None:
    torch.manual_seed(0)
    config = hf.CanineConfig(**_SMALL, num_hash_functions=2, num_hash_buckets=16, local_transformer_stride=16)
    made = example_inputs(hf.CanineModel(config))
    assert made["input_ids"].min() >= 0
    assert made["input_ids"].max() < 128


def test_a_decoder_is_no_part_with_a_text_beside() -> None:
    """Its tokens and their mask have one length; Canary's config has a `decoder_config` with a vocabulary."""
    base = build("speech-to-text", "canary")
    made = example_inputs(base, sizes={"batch": 3})
    assert (
        "decoder_attention_mask" not in made or made["decoder_attention_mask"].shape == made["decoder_input_ids"].shape
    )
    with torch.no_grad():
        assert len(base(**made).logits) == 3
