"""Encoder-decoders: two graphs over one file of weights give what the forward gives, and `peft`'s tokens."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import onnx_ir as ir
import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.decoding import GREEDY, clearly_greedy
from support.few import but_for
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
import peftfx.runtime
from peftfx.export.onnx_directory import export_onnx
from peftfx.model.adapted import AdaptedModel
from peftfx.views.encoder_decoder import DECODED, ENCODED
from peftfx.views.finding.encoder_decoder_layers import find_layers
from peftfx.views.finding.named_views import find_view

NAMES = ["t5", "bart"]


def texts(seed: int = 1) -> dict[str, Tensor]:
    """Random texts of different lengths, padded on the right."""
    ids = torch.randint(4, 99, (4, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    for row in range(1, 4):
        mask[row, -row:] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 1), "attention_mask": mask}


@dataclass
class Pair:
    """A model with a random LoRA on all that is linear: `peft`'s, peftfx's, and what that one was exported to."""

    peft: nn.Module
    ours: AdaptedModel
    directory: Path

    @cached_property
    def greedy(self) -> tuple[dict[str, Tensor], Tensor]:
        """Texts, and the tokens that `peft` generates from them, each clearly ahead of the next best."""
        return clearly_greedy(self.peft, texts)

    @cached_property
    def served(self) -> Any:
        """In ONNX Runtime."""
        report = self.ours.export(self.directory / "out", view="decode", assets=self.ours.base.config.save_pretrained)
        assert report.engine == "fast"
        return peftfx.runtime.load(self.directory / "out")


@pytest.fixture(scope="session", params=but_for({"bart"}, NAMES))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    torch.manual_seed(0)  # of the adapter's initial values
    directory = tmp_path_factory.mktemp(request.param)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(ZOO[request.param].build(), config).eval()
    randomise(model)
    model.save_pretrained(str(directory / "adapter"))
    ours = peftfx.load(ZOO[request.param].build(), directory / "adapter", road="graph")
    return Pair(model, ours, directory)


def test_greedy_tokens_are_pefts_in_torch_and_in_onnx_runtime(pair: Pair) -> None:
    given, want = pair.greedy
    assert torch.equal(pair.ours.generate(**given, **GREEDY), want)
    assert torch.equal(pair.served.generate(**given, **GREEDY), want)
    with pair.ours.disable_adapter():
        assert not torch.equal(pair.ours.generate(**given, **GREEDY), want)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 7},
        {"use_cache": False},
        {"decoder_input_ids": torch.tensor([[1, 5, 6]]).repeat(4, 1)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_of_transformers_gives_pefts_tokens(pair: Pair, options: dict[str, Any]) -> None:
    results = []
    for model in (pair.peft, pair.ours, pair.served):
        torch.manual_seed(3)
        results.append(model.generate(**texts(), **{"do_sample": False, **options}, max_new_tokens=12))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@torch.no_grad()
def test_both_graphs_in_steps_compute_what_the_forward_computes_at_once(pair: Pair) -> None:
    given = texts()
    tokens = torch.randint(4, 99, (4, 6), generator=torch.Generator().manual_seed(5))
    want = pair.ours(**given, decoder_input_ids=tokens).logits
    cache = pair.served.new_caches()
    encoded = pair.served.get_encoder()(**given)
    steps = [
        pair.served(
            decoder_input_ids=tokens[:, a:b],
            attention_mask=given["attention_mask"],
            encoder_outputs=encoded,
            cache=cache,
        ).logits
        for a, b in ((0, 3), (3, 5), (5, 6))
    ]
    torch.testing.assert_close(torch.cat(steps, 1), want, atol=1e-4, rtol=1e-4)


def test_their_sites_are_those_of_the_forward(pair: Pair) -> None:
    found = [
        {(s.path, s.kind, s.role) for s in pair.ours.graph(adapted=False, view=v).sites} for v in (ENCODED, DECODED)
    ]
    forward = {(s.path, s.kind, s.role) for s in pair.ours.graph(adapted=False).sites}
    assert found[0] | found[1] == forward


def test_no_weight_is_written_twice(pair: Pair) -> None:
    assert pair.served is not None
    out = pair.directory / "out"
    assert sorted(p.name for p in out.glob("*.onnx*")) == [
        "decoder_model.onnx",
        "encoder_model.onnx",
        "model.onnx.data",
    ]
    places: dict[str, set[tuple[int, int]]] = {}
    for stem in ("encoder_model", "decoder_model"):
        values = ir.load(out / f"{stem}.onnx").graph.initializers.values()
        tensors = [v.const_value for v in values if isinstance(v.const_value, ir.ExternalTensor)]
        places[stem] = {(int(t.offset or 0), int(t.length or 0)) for t in tensors}
    assert places["encoder_model"] & places["decoder_model"], "the embedding that both read is one"
    own = sorted(places["encoder_model"] | places["decoder_model"])
    assert all(a + n <= b for (a, n), (b, _) in pairwise(own)), "no two share a byte"
    size = (out / "model.onnx.data").stat().st_size
    unique = {p.data_ptr(): p for p in pair.ours.base.parameters()}.values()
    assert size < sum(p.numel() * 4 for p in unique) + 70_000  # alignment, and what is kept inside the graphs


def test_what_two_graphs_cannot_give_is_refused(pair: Pair) -> None:
    masked = {"decoder_input_ids": torch.ones(4, 2).long(), "decoder_attention_mask": torch.tensor([[0, 1]] * 4)}
    encoded = {"encoder_outputs": pair.ours.base.get_encoder()(**texts()), "attention_mask": texts()["attention_mask"]}
    modules, graph = peftfx.load(pair.peft), pair.ours
    for asked in ({**texts(), **masked}, encoded):  # the base's own modules give it
        got, want = (model.generate(**asked, max_new_tokens=4, do_sample=False) for model in (modules, pair.peft))
        assert got.equal(want)
    with pytest.raises(peftfx.PeftfxError, match="no mask for its own tokens"):
        graph.generate(**texts(), **masked, max_new_tokens=2)
    with pytest.raises(peftfx.PeftfxError, match="lack the decoder's keys"):
        graph.generate(**encoded, max_new_tokens=2)
    with pytest.raises(peftfx.PeftfxError, match="static"):
        pair.served.generate(**texts(), cache_implementation="static", max_new_tokens=2)


def test_a_model_without_a_decoder_has_no_such_views() -> None:
    with pytest.raises(peftfx.PeftfxError, match="cannot be split into an encoder"):
        find_view(ZOO["gpt2"].build(), "encoder")


def test_an_encoders_output_keeps_its_class() -> None:
    sizes = {"d_model": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8, "vocab_size": 99}
    config = hf.SwitchTransformersConfig(**sizes, d_ff=48, num_experts=2, pad_token_id=1, decoder_start_token_id=4)
    layers = find_layers(hf.SwitchTransformersForConditionalGeneration(config).eval())  # its encoder has no `use_cache`
    assert "router_probs" in {field.name for field in dataclasses.fields(layers.output)}


@pytest.mark.further
def test_a_table_of_positions_that_grows_limits_texts_to_what_the_model_is_made_for(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 99, "max_position_embeddings": 16}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    model = hf.M2M100ForConditionalGeneration(hf.M2M100Config(**sizes, **heads)).eval()
    report = export_onnx(model, tmp_path / "out", view="decode")
    assert any("encoder_sequence" in line and "made for no more tokens" in line for line in report.sizes)
