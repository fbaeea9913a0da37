"""The calls that are compared read the rows of trained tokens: random texts of a large vocabulary have none of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import peft
import pytest
import torch
import transformers as hf
from onnx import numpy_helper
from support.adapted import randomise

import peftfx
from peftfx.export import merge_command
from peftfx.export.steps import verification
from peftfx.export.steps.steps import ExportSteps
from peftfx.export.verification.cases import with_trained_tokens
from peftfx.export.verification.comparison import VerificationError
from peftfx.model.adapted import AdaptedModel

WORDS, TOKENS = 3000, (2900, 17, 2)
SIZES = {"vocab_size": WORDS, "num_attention_heads": 2, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": 1}
LLAMA = {**SIZES, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
T5 = {"vocab_size": WORDS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "eos_token_id": 2}


def llama() -> hf.PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)).eval()


def t5() -> hf.PreTrainedModel:
    return hf.T5ForConditionalGeneration(hf.T5Config(**T5)).eval()


def adapted(make: Callable[[], hf.PreTrainedModel], rule: object) -> AdaptedModel:
    model = peftfx.transform(make(), rule)
    randomise(model)
    return model


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each export loses the row of the first trained token when it is written, and does not read its tables back."""
    write = ExportSteps.write

    def lossy(self: ExportSteps, programs: object, directory: Path, *args: object) -> None:
        write(self, programs, directory, *args)  # type: ignore[arg-type]
        graphs = {path: onnx.load(path) for path in directory.glob("*.onnx")}
        (directory / "model.onnx.data").unlink()
        for path, graph in graphs.items():
            for tensor in graph.graph.initializer:
                if WORDS in tensor.dims:
                    value = numpy_helper.to_array(tensor).copy()
                    np.moveaxis(value, value.shape.index(WORDS), 0)[TOKENS[0]] = 0
                    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
            onnx.save(graph, path)

    monkeypatch.setattr(ExportSteps, "write", lossy)
    monkeypatch.setattr(verification, "refuted", lambda *_: ())


ROWS = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=list(TOKENS), task_type="CAUSAL_LM")


@pytest.mark.parametrize(
    ("make", "rule", "options"),
    [
        (llama, peftfx.TrainableTokens(token_indices=TOKENS), {"view": "forward"}),
        (llama, ROWS, {"view": "decode", "merge": True}),
        pytest.param(llama, ROWS, {"batched": ["default"]}, marks=pytest.mark.further),
        pytest.param(t5, peftfx.TrainableTokens(token_indices=TOKENS), {}, marks=pytest.mark.further),
    ],
)
def test_a_row_that_is_lost_is_an_error(
    make: Callable[[], hf.PreTrainedModel], rule: object, options: dict, forgetful: None, tmp_path: Path
) -> None:
    with pytest.raises(VerificationError, match="ONNX Runtime disagrees"):
        adapted(make, rule).export(tmp_path / "out", **options)


def test_the_merged_directory_is_compared_at_these_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    randomised = peftfx.transform(model, peftfx.TrainableTokens(token_indices=TOKENS))
    randomise(randomised)
    randomised.save_pretrained(tmp_path / "adapter")
    copied = merge_command.merged_copy

    def lossy(model: peftfx.AdaptedModel) -> tuple[torch.nn.Module, object]:
        merged, done = copied(model)
        words = merged.get_input_embeddings()
        rows = words.weight.detach().clone()
        rows[TOKENS[0]] = 0
        words.weight = torch.nn.Parameter(rows)
        return merged, done

    merge_command.merge_directory(tmp_path / "base", tmp_path / "good", adapter=tmp_path / "adapter")
    monkeypatch.setattr(merge_command, "merged_copy", lossy)
    with pytest.raises(VerificationError, match="of what was written is"):
        merge_command.merge_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter")


def test_special_tokens_stay_and_ends_are_put_where_texts_may_have_them() -> None:
    model = adapted(llama, peftfx.TrainableTokens(token_indices=TOKENS))
    ids = torch.tensor([[1, 5, 6, 7, 8, 9, 2, 0, 0], [10, 11, 12, 13, 14, 15, 16, 18, 19]])
    plain, ends = (with_trained_tokens({"input_ids": ids}, model, ends=given)["input_ids"] for given in (False, True))
    assert set(plain[plain != ids].tolist()) == {17, 2900}
    assert set(ends[ends != ids].tolist()) == {2, 17, 2900}
    for special in (0, 1, 2):
        assert bool((plain[ids == special] == special).all() and (ends[ids == special] == special).all())
    assert torch.equal(with_trained_tokens({"input_ids": ids}, adapted(llama, peftfx.LoRA(r=2)))["input_ids"], ids)
