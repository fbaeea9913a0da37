"""A branch of a model's code on a boolean of its inputs: one side serves all calls, or each call gets its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import Tensor, nn

import peftfx
import peftfx.runtime
from peftfx.bases.example_inputs import example_inputs
from peftfx.export import OnnxModel, export_onnx
from peftfx.views.dry_run import fake_run

PADDED = torch.tensor([[3, 5, 8, 4], [6, 2, 1, 1]])
PLAIN = torch.tensor([[3, 5, 8, 4], [6, 2, 9, 7]])


class Branching(nn.Module):
    """Code that does something more if a call has padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layer = nn.Embedding(12, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor) -> Tensor:
        padding = input_ids == 1
        x = self.layer(self.embedding(input_ids))
        return self.more(x, padding) if padding.any() else x

    def more(self, x: Tensor, padding: Tensor) -> Tensor:
        """What is done of a padded call."""
        raise NotImplementedError


class Masking(Branching):
    def more(self, x: Tensor, padding: Tensor) -> Tensor:
        return x.masked_fill(padding[..., None], 0)


class Doubling(Branching):
    def more(self, x: Tensor, padding: Tensor) -> Tensor:
        return 2 * x


def lora(model: nn.Module, example: Tensor) -> peftfx.AdaptedModel:
    rule = peftfx.LoRA(r=2, target="head", init_lora_weights=False)
    return peftfx.transform(model, rule, inputs={"input_ids": example})


@pytest.mark.parametrize("example", [PADDED, PLAIN])
def test_a_mask_that_is_skipped_where_it_shows_everything_is_one_graph(example: Tensor, tmp_path: Path) -> None:
    model, calls = Masking().eval(), (PADDED, PLAIN, PLAIN[:1])
    adapted = lora(model, example)
    adapted.export(tmp_path / "out")
    served = peftfx.runtime.load(tmp_path / "out")
    outputs = [adapted(input_ids=ids) for ids in calls]
    adapted.merge()
    for ids, got in zip(calls, outputs, strict=True):
        torch.testing.assert_close(got, model(ids))
        torch.testing.assert_close(served(input_ids=ids)["output"], got, atol=1e-5, rtol=1e-5)


def test_a_graph_of_the_general_side_needs_no_decision() -> None:
    graph = peftfx.capture(Masking().eval(), {"input_ids": PLAIN})
    assert graph.decisions == ()
    torch.testing.assert_close(graph(input_ids=PADDED), Masking().eval()(PADDED))


def test_each_side_that_differs_gets_a_graph() -> None:
    for example, other in ((PADDED, PLAIN), (PLAIN, PADDED)):
        model = Doubling().eval()
        graph = peftfx.capture(model, {"input_ids": example})
        torch.testing.assert_close(graph(input_ids=example), model(example))
        with pytest.raises(peftfx.PeftfxError, match=r"branch at \w+\.py:\d+ \(`return .*`\) on input_ids goes as in"):
            graph(input_ids=other)
        adapted = lora(model, example)
        outputs = {ids: adapted(input_ids=ids) for ids in (example, other)}
        adapted.merge()
        for ids, got in outputs.items():
            torch.testing.assert_close(got, model(ids))


def test_training_takes_the_side_of_each_call() -> None:
    model = Masking().train()
    adapted = lora(model, PLAIN)
    outputs = {ids: adapted(input_ids=ids) for ids in (PLAIN, PADDED)}
    adapted.merge()
    for ids, got in outputs.items():
        torch.testing.assert_close(got, model(ids))


def test_an_export_of_one_side_is_refused_or_refuses_the_other_itself(tmp_path: Path) -> None:
    model = Doubling().eval()
    adapted = peftfx.transform(
        model, peftfx.LoRA(r=2, target="head", init_lora_weights=False), inputs={"input_ids": PADDED}
    )
    with pytest.raises(peftfx.PeftfxError, match="branches on a value: this export would be right only where"):
        adapted.export(tmp_path / "out")
    report = adapted.export(tmp_path / "out", allow_fixed=True)
    assert "goes as in the example (True)" in report.sizes[0]
    served = peftfx.export.OnnxModel(tmp_path / "out")
    torch.testing.assert_close(served(input_ids=PADDED)["output"], adapted(input_ids=PADDED), atol=1e-5, rtol=1e-5)
    with pytest.raises(peftfx.PeftfxError, match=r"out of data bounds[\s\S]*is right where: the branch at \w+\.py:\d+"):
        served(input_ids=PLAIN)


@pytest.mark.parametrize("view", ["forward", "decode"])
def test_texts_are_served_to_the_last_token_that_decides_nothing(view: str, tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = hf.LlamaConfig(**sizes, vocab_size=32, max_position_embeddings=12, rope_parameters=rope)
    model = hf.LlamaForCausalLM(config).eval()
    (said,) = peftfx.export_onnx(model, tmp_path / "out", view=view).sizes
    assert "(`if seq_len > max_seq_len_cached:  # growth`)" in said
    longest, longer = torch.randint(3, 32, (2, 12)), torch.randint(3, 32, (1, 13))
    if view == "forward":
        served = OnnxModel(tmp_path / "out")
        mask = torch.ones_like(longest)
        torch.testing.assert_close(served(input_ids=longest, attention_mask=mask)["logits"], model(longest).logits)
        with pytest.raises(peftfx.PeftfxError, match=r"is right where: .*seq_len > max_seq_len_cached"):
            served(input_ids=longer, attention_mask=torch.ones_like(longer))
    else:
        generated = peftfx.runtime.load(tmp_path / "out").generate(longest[:, :5], max_new_tokens=7, do_sample=False)
        assert torch.equal(generated, model.generate(longest[:, :5], max_new_tokens=7, do_sample=False))


class Writing(nn.Module):
    """A mask that is written in place before it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = torch.zeros_like(mask)
        scores[mask == 2] = 5
        x = self.layer(x)
        return x * 3 if (scores > 0).flatten().any().item() else x


def test_a_boolean_knows_what_was_written_into_its_tensor() -> None:
    model, x = Writing().eval(), torch.randn(2, 3, 4)
    for mask in (torch.tensor([[1, 1, 1], [1, 2, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])):
        graph = peftfx.capture(model, {"x": x, "mask": mask})
        torch.testing.assert_close(graph(x=x, mask=mask), model(x, mask))


class OfWeights(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y * 3 if (y > 100).any() else y


def test_a_branch_on_what_weights_compute_is_refused() -> None:
    with pytest.raises(peftfx.PeftfxError, match="branches on the values of a tensor"):
        peftfx.capture(OfWeights().eval(), {"x": torch.randn(2, 4)})


def test_a_model_that_asks_whether_a_text_is_padded_serves_both() -> None:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "d_model": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32}
    config = hf.FSMTConfig(src_vocab_size=40, tgt_vocab_size=40, **sizes, **heads, langs=["en", "de"])
    model = hf.FSMTForConditionalGeneration(config).eval()
    adapted = peftfx.transform(model, peftfx.LoRA(r=2, target="head", init_lora_weights=False))
    inputs = example_inputs(model)
    padded = inputs["decoder_input_ids"].clone()
    padded[1, -2:] = config.pad_token_id
    outputs = []
    for ids in (inputs["decoder_input_ids"], padded):
        outputs.append(adapted(**{**inputs, "decoder_input_ids": ids}).logits)
    adapted.merge()
    for ids, got in zip((inputs["decoder_input_ids"], padded), outputs, strict=True):
        want = model(**{**inputs, "decoder_input_ids": ids}).logits
        torch.testing.assert_close(got[ids != config.pad_token_id], want[ids != config.pad_token_id])


class Windows(nn.Module):
    """Pads a text to windows, computes the mean of each, and takes the padding off again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        padding = (3 - length % 3) % 3
        if padding > 0:
            x = F.pad(x, (0, 0, 0, padding))
        count = torch.div(x.shape[1], 3, rounding_mode="trunc")
        windows = self.layer(x).reshape(x.shape[0], count, 3, 4)
        x = (windows + windows.mean(2, keepdim=True)).flatten(1, 2)
        return x[:, :-padding] if padding > 0 else x


def test_a_text_padded_to_windows_is_one_graph_for_all_lengths(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, inputs = Windows().eval(), {"x": torch.randn(2, 7, 4)}
    axes = {"x": ("batch", "sequence", None)}
    graph = peftfx.capture(model, inputs, axes=axes)
    for length in (5, 6, 9, 10):  # 6 and 9 need no padding
        x = torch.randn(3, length, 4)
        torch.testing.assert_close(graph.run(x)[0], model(x))
    report = export_onnx(model, tmp_path / "out", inputs=inputs)
    assert not report.sizes
    served = OnnxModel(tmp_path / "out")
    for length in (4, 6):
        x = torch.randn(1, length, 4)
        torch.testing.assert_close(served(x=x)["output"], model(x), atol=1e-5, rtol=1e-5)


def test_torch_divides_as_before_after_a_capture() -> None:
    before = torch.div, torch.SymInt.__mod__
    peftfx.capture(Windows().eval(), {"x": torch.randn(2, 7, 4)})
    assert (torch.div, torch.SymInt.__mod__) == before


class Asking(nn.Module):
    """Code that asks for a boolean on its way."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x.masked_fill(mask, 0) if mask.any() else x


def test_a_dry_run_takes_a_side_of_a_branch_on_a_boolean() -> None:
    model = Asking().eval()
    with fake_run(model) as fake:
        assert model(fake(torch.randn(2, 5)), fake(torch.ones(2, 5, dtype=torch.bool))).shape == (2, 5)


class Gated(nn.Module):
    """Code that skips layers by its own buffers, as EoMT's does, after parameters and buffers that have two names."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.more, self.again = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.head.weight
        self.register_buffer("off", torch.zeros(2))
        self.register_buffer("off_too", self.off)
        self.register_buffer("on", torch.tensor([1.0, 0.0]))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.head(input_ids)
        if self.off_too.any():
            x = x + 1
        for share in self.on:
            if share > 0:
                x = self.again(self.more(x))
        return x


@pytest.mark.parametrize("road", ["modules", "graph"])
def test_a_branch_on_the_models_buffers_goes_as_they_say_now(road: str, tmp_path: Path) -> None:
    model, x = Gated().eval(), torch.randn(3, 7, 4)
    rule = peftfx.LoRA(r=2, target="/head|more/", init_lora_weights=False)
    adapted = peftfx.transform(model, rule, inputs={"input_ids": torch.randn(5, 6, 4)}, road=road)
    for number, share in enumerate((0, 1)):
        model.on[1] = share
        want = adapted(input_ids=x)
        report = adapted.export(tmp_path / str(number))
        assert report.sizes == []
        served = OnnxModel(tmp_path / str(number))
        torch.testing.assert_close(served(input_ids=x)["output"], want, atol=1e-5, rtol=1e-5)
    adapted.merge()
    torch.testing.assert_close(model(x), want, atol=1e-5, rtol=1e-5)


def test_a_branch_on_a_buffer_that_the_code_changes_is_refused() -> None:
    class Counting(Gated):
        def forward(self, input_ids: Tensor) -> Tensor:
            self.off += 1
            return super().forward(input_ids)

    with pytest.raises(peftfx.PeftfxError, match="branches on the values of a tensor"):
        peftfx.capture(Counting().eval(), {"input_ids": torch.randn(2, 4)})


CODE = {
    "runs aten.equal": lambda x: torch.cov(x[0]),
    "calls torch.cond": lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
    "no graph has: a Generator": lambda x: x + torch.ones(3, 1, 1).normal_(generator=torch.Generator().manual_seed(0)),
}


@pytest.mark.parametrize("told", CODE)
def test_code_that_no_graph_has_is_named(told: str) -> None:
    class Behind(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return CODE[told](x)

    with pytest.raises(peftfx.PeftfxError, match=f"cannot capture this model: .*{told}"):
        peftfx.capture(Behind().eval(), {"x": torch.randn(3, 4, 5)})
