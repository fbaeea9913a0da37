"""Rules of HF PEFT name layers that the example call does not run, or uses nothing of: they act in calls that do."""

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
from peftfx.export.merge_command import merge_directory
from peftfx.model.adapted import AdaptedModel


def every_layer() -> peft.LoraConfig:
    return peft.LoraConfig(r=2, target_modules="all-linear")  # `get_peft_model` writes names into it


def shaken(adapted: AdaptedModel) -> AdaptedModel:
    for p in adapted.adapters.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return adapted.eval()


def test_cross_attention_of_a_decoder_alone_is_trained_merged_and_counted(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 20}
    base = hf.BartForCausalLM(hf.BartConfig(vocab_size=40, encoder_layers=1, **sizes)).eval()
    ours = shaken(peftfx.transform(copy.deepcopy(base), every_layer()))
    theirs = peft.get_peft_model(copy.deepcopy(base), every_layer())
    assert peftfx.get_peft_model_state_dict(ours).keys() == peft.get_peft_model_state_dict(theirs).keys()
    ours.save_pretrained(tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "adapter"), is_trainable=True).eval()
    calls = [{"input_ids": torch.randint(40, (3, 6))}]
    calls.append(calls[0] | {"encoder_hidden_states": torch.randn(3, 5, 16)})
    for call in calls:
        want, got = theirs(**call).logits, ours(**call).logits
        torch.testing.assert_close(got, want)
        want.square().sum().backward()
        got.square().sum().backward()
        grads = (sum(p.grad.norm() for p in m.parameters() if p.grad is not None) for m in (theirs, ours))
        torch.testing.assert_close(*grads)
    assert ours.export(tmp_path / "out", view="forward").tensors["not run here"] == 8
    merged, want = ours.merge_and_unload(), theirs.merge_and_unload()
    torch.testing.assert_close(merged(**calls[1]).logits, want(**calls[1]).logits)


class Spare(nn.Module):
    """A model that cannot be captured, with a layer that it runs where it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.spare = nn.Linear(8, 8), nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor, more: bool = False) -> Tensor:
        y = self.body(x) if x.sum() > 0 else self.body(-x)
        return self.spare(y.transpose(1, 2)).transpose(1, 2) if more else y


@pytest.mark.filterwarnings("ignore:.*but not exported")
def test_a_layer_that_one_call_runs_in_a_model_without_a_graph(tmp_path: Path) -> None:
    base, x = Spare().eval(), torch.randn(2, 5, 8)
    config = peft.LoraConfig(r=2, target_modules=["body", "spare"])
    ours = shaken(peftfx.transform(copy.deepcopy(base), config, inputs={"x": x}))
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    for more in (False, True):
        torch.testing.assert_close(ours(x=x, more=more), theirs(x=x, more=more))
    again = shaken(copy.deepcopy(ours)).double()
    again.add_adapter("second", peft.LoraConfig(r=2, target_modules=["spare"]))
    assert {site.path for site in again.sites} == {"body", "spare"}


def test_on_the_graph_road_such_layers_are_refused_by_name() -> None:
    base = hf.BartForCausalLM(hf.BartConfig(vocab_size=40, d_model=16, decoder_layers=1, encoder_layers=1))
    with pytest.raises(peftfx.PeftfxError, match=r"encoder_attn\.k_proj: this call does not run it"):
        peftfx.transform(base, every_layer(), road="graph")


@pytest.mark.further
def test_an_adapter_file_leaves_out_what_the_graph_does_not_run_and_says_so(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 20}
    base = hf.BartForCausalLM(hf.BartConfig(vocab_size=40, encoder_layers=1, **sizes)).eval()
    peftfx.export_onnx(copy.deepcopy(base), tmp_path / "graph", slots="all-linear", view="forward")
    ours = shaken(peftfx.transform(base, every_layer()))
    with pytest.warns(UserWarning, match=r"the graph does not run these modules.*encoder_attn\.k_proj"):
        peftfx.export_adapter(ours, tmp_path / "graph", tmp_path / "adapter")


@pytest.mark.further
def test_a_merge_writes_the_layers_that_no_example_runs(tmp_path: Path) -> None:
    base = build("speech-to-text", "qwen3_asr").eval()
    base.save_pretrained(tmp_path / "base")
    shaken(peftfx.transform(copy.deepcopy(base), every_layer())).save_pretrained(tmp_path / "adapter")
    report = merge_directory(tmp_path / "base", tmp_path / "merged", adapter=tmp_path / "adapter")
    assert "model.audio_tower.layers.0.fc1" in report.not_run
    assert "no call that is compared uses them" in str(report)
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    merged = type(base).from_pretrained(tmp_path / "merged").state_dict()
    assert all(torch.allclose(merged[name], theirs[name], atol=1e-6) for name in theirs)


class Table(nn.Module):
    """A layer that reads a stored table, as Swin V2's of relative positions does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.bias = nn.Linear(8, 8), nn.Linear(2, 8)
        self.register_buffer("places", torch.rand(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.bias(self.places)


def test_a_layer_that_reads_a_stored_table_runs_in_its_module(tmp_path: Path) -> None:
    base, x = Table().eval(), torch.randn(3, 5, 8)
    config = peft.LoraConfig(r=2, target_modules=["body", "bias"])
    ours = shaken(peftfx.transform(copy.deepcopy(base), config, inputs={"x": x}))
    assert ours.road == "modules"
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    torch.testing.assert_close(ours(x=x), theirs(x=x))
