"""`peftfx convert --tuned`: on the base, in `peft`, the LoRA is the tuned checkpoint; what it lacks is told."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftfx
from peftfx.adapters.checkpoint_difference import CheckpointDifference
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export.convert_command import convert_directory

SIZE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
MOE = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "num_local_experts": 4, "tie_word_embeddings": False}
BUILD: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZE, tie_word_embeddings=True)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**SIZE, max_position_embeddings=32)),
    "mixtral": lambda: hf.MixtralForCausalLM(hf.MixtralConfig(**SIZE, **MOE)),
    "gpt_oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**SIZE, **MOE, head_dim=8)),
}


def build(name: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    made = BUILD[name]().eval()
    stir(made.parameters(), 0.02, 1)
    return made


@torch.no_grad()
def stir(tensors: Iterator[Tensor], size: float, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        tensor.add_(size * torch.randn(tensor.shape, generator=rng))


def weights(model: nn.Module) -> Iterator[Tensor]:
    return (p for n, p in model.named_parameters() if p.ndim > 1 and not n.endswith("_bias"))


def saved(model: hf.PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def same_in_peft(base: hf.PreTrainedModel, lora: Path, tuned: hf.PreTrainedModel) -> None:
    theirs = peft.PeftModel.from_pretrained(base, lora).eval()
    for shape in ((2, 7), (1, 4)):
        ids = torch.randint(2, 60, shape, generator=torch.Generator().manual_seed(sum(shape)))
        with torch.no_grad():
            torch.testing.assert_close(theirs(input_ids=ids).logits, tuned(input_ids=ids).logits, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("sides", ["embedding", "head", "both"])
def test_a_tied_base_and_an_untied_checkpoint(name: str, sides: str, tmp_path: Path) -> None:
    base, tuned = build(name), build(name)
    tuned.config.tie_word_embeddings = False
    head, embedding = tuned.get_output_embeddings(), tuned.get_input_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())
    if head.bias is not None:
        head.bias = nn.Parameter(head.bias.detach().clone())
    stir((side.weight for side in (embedding, head) if sides in (("embedding", "head")[side is head], "both")), 0.1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        convert_directory(
            saved(base, tmp_path / "base"), tmp_path / "lora", tuned=saved(tuned, tmp_path / "tuned"), rank=32
        )
    assert len(peft.PeftConfig.from_pretrained(tmp_path / "lora").target_modules) == 1 + (sides == "both")
    same_in_peft(base, tmp_path / "lora", tuned)


@pytest.mark.parametrize("rank", [1.0, 16])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_weights_become_target_parameters(name: str, rank: float, tmp_path: Path) -> None:
    base, tuned = build(name), build(name)
    if rank == 1.0:
        stir(weights(tuned), 0.1, 2)
    else:  # of rank 2 at the experts alone
        rng = torch.Generator().manual_seed(2)
        for weight in (p for n, p in tuned.named_parameters() if n.endswith("_proj") and "experts" in n):
            a, b = (torch.randn(4, size, 2, generator=rng) for size in weight.shape[1:])
            weight.data += 0.1 * a @ b.mT
    said = convert_directory(
        saved(base, tmp_path / "base"), tmp_path / "lora", tuned=saved(tuned, tmp_path / "tuned"), rank=rank
    )
    assert "keeps" not in said
    config = peft.PeftConfig.from_pretrained(tmp_path / "lora")
    assert {name.rpartition(".")[2] for name in config.target_parameters} >= {"gate_up_proj", "down_proj"}
    same_in_peft(base, tmp_path / "lora", tuned)


@torch.no_grad()
def test_the_share_of_experts_that_a_cut_keeps(tmp_path: Path) -> None:
    base, tuned = build("mixtral"), build("mixtral")
    stir(weights(tuned), 0.1, 2)
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")
    said = convert_directory(folders[0], tmp_path / "lora", tuned=folders[1], rank=0.7)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "lora").merge_and_unload()
    own = dict(build("mixtral").named_parameters())
    left, whole = 0.0, 0.0
    for (name, got), want in zip(theirs.named_parameters(), tuned.parameters(), strict=True):
        left += float((want - got).square().sum())
        whole += float((want - own[name]).square().sum())
    assert 0.7 < 1 - left / whole < 0.85
    assert f"it keeps {100 * (1 - left / whole):.2f}% of the energy" in said


def test_buffers_that_differ_are_told_with_their_share(tmp_path: Path) -> None:
    config = hf.ResNetConfig(
        num_channels=3, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic", num_labels=3
    )
    base = hf.ResNetForImageClassification(config)
    folder = saved(base, tmp_path / "base")
    norm = base.resnet.embedder.embedder.normalization
    base.resnet.embedder.embedder.convolution.weight.data += 0.1
    norm.running_mean += 0.2
    moved = saved(base, tmp_path / "tuned")
    share = 8 * 0.2**2 / (8 * 0.2**2 + 0.1**2 * base.resnet.embedder.embedder.convolution.weight.numel())
    with pytest.warns(PeftfxWarning, match=rf"normalization\.running_mean; they have {100 * share:.2g}% of the energy"):
        said = convert_directory(folder, tmp_path / "lora", tuned=moved, rank=1)
    assert f"it keeps {100 * (1 - share):.2f}% of the energy" in said


def test_weights_that_are_tied_in_both_have_no_name_too_many(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = hf.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=24, num_layers=1, num_heads=4, decoder_start_token_id=0
    )
    base = hf.T5ForConditionalGeneration(config)
    folder = saved(base, tmp_path / "base")
    stir(weights(base), 0.1, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftfxWarning)
        said = convert_directory(folder, tmp_path / "lora", tuned=saved(base, tmp_path / "tuned"), rank=1.0)
    assert "keeps" not in said


def test_a_lora_that_lacks_a_module_is_an_error() -> None:
    base, tuned = build("llama"), build("llama")
    stir((p for n, p in tuned.named_parameters() if "q_proj" in n or "k_proj" in n), 0.1, 2)
    ours = peftfx.transform(build("llama"), peftfx.LoRA(target_modules=["q_proj"]))
    change = CheckpointDifference(base, tuned, ours.sites.weights)
    with pytest.raises(PeftfxError, match="read back, the LoRA lacks 100% of the energy of what differs, and not 0%"):
        change.kept_by(ours.adapter("default"), 1.0)


@pytest.mark.parametrize("to", ["peft", "kohya"])
def test_files_that_fail_their_check_are_not_left(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = build("llama"), build("llama")
    stir((p for n, p in tuned.named_parameters() if "q_proj" in n), 0.1, 2)
    folders = saved(base, tmp_path / "base"), saved(tuned, tmp_path / "tuned")

    def fails(*_: object) -> float:
        raise PeftfxError("read back, the LoRA lacks something", "", "report this")

    monkeypatch.setattr(CheckpointDifference, "kept_by", fails)
    target, mine = tmp_path / "lora", {"the user's": torch.ones(2)}
    for before in (False, True):
        if before:
            target.mkdir() if to == "peft" else save_file(mine, target)
        with pytest.raises(PeftfxError, match="lacks something"):
            convert_directory(folders[0], target, tuned=folders[1], rank=2, to=to, force=before)
        assert target.exists() == before
    assert [*target.iterdir()] == [] if to == "peft" else load_file(target).keys() == mine.keys()
