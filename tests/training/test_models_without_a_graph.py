"""Models whose code cannot be captured but runs: they are trained, saved and merged by their own modules."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from every_model.checks import build
from torch import Tensor, nn

import peftfx
from peftfx.bases.example_inputs import example_inputs
from peftfx.errors import CaptureError, PeftfxWarning
from peftfx.export.merge_command import merge_directory

WARNED = "can be trained, saved and merged, but not exported"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
pytestmark = pytest.mark.filterwarnings(f"ignore:.*{WARNED}")


class Deciding(nn.Module):
    """A norm that branches on its values, and a layer inside it that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(2 * x) if x.sum() > 0 else self.inner(x)


class Alone(nn.Linear):
    """A layer whose own forward branches on its values."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if y.sum() > 0 else y / 2


def model(norm: type[nn.Module] = Deciding) -> hf.LlamaForCausalLM:
    torch.manual_seed(0)
    made = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=50, **SIZES)).eval()
    made.model.norm = norm() if norm is Deciding else norm(32, 32)
    return made


def saved_by_peft(base: nn.Module, config: peft.PeftConfig, directory: Path) -> peft.PeftModel:
    """Save random trained tensors of an adapter, and return HF PEFT's model of the files."""
    made = peft.get_peft_model(copy.deepcopy(base), config)
    for p in made.parameters():
        p.data += 0.05 * torch.randn_like(p) * p.requires_grad
    made.save_pretrained(str(directory))
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), str(directory), is_trainable=True).eval()


def step(trained: nn.Module, ids: Tensor) -> tuple[float, list[Tensor]]:
    """Return the loss of a step, and the gradients' norms in order."""
    loss = trained(input_ids=ids, labels=ids).loss
    loss.backward()
    return float(loss), sorted(p.grad.norm() for p in trained.parameters() if p.grad is not None and p.grad.any())


CONFIGS = {
    "lora": peft.LoraConfig(r=3, target_modules="all-linear", lora_bias=True),
    "dora": peft.LoraConfig(r=2, target_modules=["q_proj", "inner"], use_dora=True),
    "ia3": peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "norms and copies": peft.LNTuningConfig(target_modules=["input_layernorm"], modules_to_save=["lm_head"]),
    "rows": peft.LoraConfig(r=2, target_modules=["up_proj"], trainable_token_indices={"embed_tokens": [1, 4]}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_is_that_of_peft(name: str, tmp_path: Path) -> None:
    base = model()
    theirs = saved_by_peft(base, CONFIGS[name], tmp_path)
    ours = peftfx.load(copy.deepcopy(base), tmp_path).eval()
    assert ours.road == "modules"
    for seed, size in enumerate([(1, 4), (3, 9)]):
        ids = torch.randint(50, size, generator=torch.Generator().manual_seed(seed))
        (want, theirs_norms), (got, ours_norms) = step(theirs, ids), step(ours, ids)
        assert got == pytest.approx(want, rel=1e-6)
        torch.testing.assert_close(torch.stack(ours_norms), torch.stack(theirs_norms), rtol=1e-5, atol=1e-7)


def test_a_file_may_hold_layers_that_the_call_does_not_run(tmp_path: Path) -> None:
    """As they were made, since no call of training ran them; trained ones are refused."""
    base = model()
    base.model.norm.other = nn.Linear(32, 32)  # an attribute that no call of the example runs
    base.model.norm.register_forward_hook(lambda module, args, y: module.other(y) if y.shape[1] > 9 else y)
    made = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=["q_proj", "other"]))
    for name, p in made.named_parameters():
        p.data += 0.05 * torch.randn_like(p) * (p.requires_grad and "other" not in name)
    made.save_pretrained(str(tmp_path / "as made"))
    ours = peftfx.load(copy.deepcopy(base), tmp_path / "as made")
    for length in (5, 12):
        ids = torch.randint(0, 50, (2, length))
        torch.testing.assert_close(step(ours, ids), step(made, ids))
    assert any("other" in name and p.grad is not None for name, p in ours.named_parameters())
    made.base_model.model.model.norm.other.lora_B.default.weight.data += 0.1
    made.save_pretrained(str(tmp_path / "trained"))
    with pytest.raises(peftfx.PeftfxError, match="this call does not run it"):
        peftfx.load(copy.deepcopy(base), tmp_path / "trained")


def test_what_is_trained_is_saved_and_merged(tmp_path: Path) -> None:
    base, ids = model(), torch.randint(50, (2, 7))
    with pytest.warns(PeftfxWarning, match=f"{WARNED}: .*branches on the values of a tensor, at .*sum"):
        ours = peftfx.transform(copy.deepcopy(base), peftfx.LoRA(target_modules="all-linear"), seed=1)
    for p in ours.adapters.parameters():
        p.data += 0.05 * torch.randn_like(p)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    want = theirs(input_ids=ids).logits
    torch.testing.assert_close(ours.eval()(input_ids=ids).logits, want)
    again = copy.deepcopy(ours).double()
    again.add_adapter("second", peftfx.LoRA(target_modules=["inner"]))  # the sites are found anew
    again.set_adapter("default")
    torch.testing.assert_close(again(input_ids=ids).logits.float(), want)
    torch.testing.assert_close(ours.merge_and_unload()(input_ids=ids).logits, want)


def test_random_numbers_are_drawn_as_without_the_run_that_finds_the_layers() -> None:
    state = torch.get_rng_state()
    peftfx.plan(model(), peftfx.LoRA(target_modules=["q_proj"]))
    torch.set_rng_state(state)
    base = model()
    before = torch.get_rng_state()
    peftfx.inspect(base)
    assert torch.equal(before, torch.get_rng_state())


def test_what_needs_a_graph_is_refused(tmp_path: Path) -> None:
    ours = peftfx.transform(model(), peftfx.LoRA(target_modules=["q_proj"]))
    with pytest.raises(CaptureError, match="branches on the values of a tensor"):
        ours.export(tmp_path / "out", view="forward")
    assert not (tmp_path / "out").exists()
    with pytest.raises(CaptureError, match="branches on the values of a tensor"):
        peftfx.transform(model(), peftfx.LoRA(target_modules=["q_proj"]), road="graph")
    with pytest.raises(peftfx.PeftfxError, match=r"matches no site(.|\n)*no other roles are known here"):
        peftfx.transform(model(), peftfx.LoRA(target="attention.query"))
    with pytest.raises(peftfx.PeftfxError, match="code cannot be captured: a soft prompt has no place"):
        peftfx.transform(model(), peftfx.PromptTuning(num_virtual_tokens=2))


def test_a_layer_that_decides_by_itself_takes_no_adapter_and_the_others_do() -> None:
    base = model(Alone)
    assert len(peftfx.transform(base, peftfx.LoRA(target_modules=["q_proj", "lm_head"])).sites) == 20
    with pytest.raises(peftfx.PeftfxError, match=r"cannot be adapted here: model\.norm"):
        peftfx.transform(model(Alone), peftfx.LoRA(target_modules=["q_proj", "norm"]))


def test_a_model_that_does_not_run_has_the_error_of_the_capture() -> None:
    base = model()
    base.model.norm.forward = lambda x: x.reshape(int(x.sum()), -1, 0)  # type: ignore[method-assign]
    with pytest.raises(CaptureError, match="cannot capture this model"):
        peftfx.transform(base, peftfx.LoRA(target_modules=["q_proj"]))


def test_the_command_merges_such_a_model(tmp_path: Path) -> None:
    base = build("visual-question-answering", "vilt").eval()
    base.save_pretrained(tmp_path / "base")
    theirs = saved_by_peft(base, peft.LoraConfig(r=2, target_modules="all-linear"), tmp_path / "adapter")
    report = merge_directory(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
    assert len(report.merged) == 15
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    inputs = example_inputs(base, sizes={"batch": 3, "sequence": 6}, seed=5)
    torch.testing.assert_close(merged(**inputs).logits, theirs(**inputs).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.further
def test_the_encoder_of_sounds_is_trained_by_a_call_with_a_sound(tmp_path: Path) -> None:
    base = build("speech-to-text", "qwen3_asr").eval()
    heard = base.config.audio_config
    mask = torch.ones(2, heard.n_window * 4, dtype=torch.long)
    mask[1, -5:] = 0
    sounds = {"input_features": torch.randn(2, heard.num_mel_bins, heard.n_window * 4), "input_features_mask": mask}
    ids = torch.full((2, 30), base.config.audio_token_id)
    ids[0, 26:], ids[1, 25:] = 3, 3  # the encoder gives 26 and 25 tokens
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **sounds}
    theirs = saved_by_peft(base, peft.LoraConfig(r=2, target_modules="all-linear"), tmp_path)
    ours = peftfx.load(copy.deepcopy(base), tmp_path, inputs=inputs).eval()
    (want, got) = (m(**inputs, labels=torch.full_like(ids, 3)) for m in (theirs, ours))
    want.loss.backward()
    got.loss.backward()
    assert float(got.loss) == float(want.loss)
    named = dict(theirs.named_parameters())
    for path, p in ours.named_parameters():
        if p.grad is not None and "audio_tower" in path and path.endswith("lora_B"):
            key = path.removeprefix("adapters.default.").removesuffix(".lora_B")
            torch.testing.assert_close(p.grad, named[f"base_model.model.{key}.lora_B.default.weight"].grad)
