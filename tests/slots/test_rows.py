"""Batched adapters beyond decoders: in both graphs of an encoder-decoder, and prompts ahead of each row's own text."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import transformers as hf
from support.slots import GREEDY, adapted_by, stirred, texts
from support.zoo import TOKENS, ZOO
from torch import Tensor, nn

from peftfx import IA3, LoRA, PeftfxError, PrefixTuning, PromptTuning, PTuning, runtime, transform
from peftfx.export.slots import batched
from peftfx.export.verification.comparison import VerificationError
from peftfx.export.verification.tolerances.sigmoids import made_by_sigmoids
from peftfx.generation.step_images import EncodesImages
from peftfx.model.adapted import AdaptedModel
from peftfx.serving.call_rows import CallRows, KeptRows, RowAdapters
from peftfx.views.images.encoded import IMAGE_FEATURES, Images
from peftfx.views.row_adapters import IDS, lay

RULES = {
    "low": LoRA(r=2, lora_alpha=5, target="all-linear"),
    "scales": IA3(),
    "prompt": PromptTuning(num_virtual_tokens=5),
    "mixed": [PTuning(num_virtual_tokens=2, encoder_hidden_size=16), LoRA(r=3, target="attention.value | mlp.down")],
}
FURTHER = pytest.mark.further
NAMES = ["prompt", None, "mixed", "low", "scales"]


def held_row_by_row(adapted: AdaptedModel, served: runtime.Served, inputs: dict[str, torch.Tensor]) -> None:
    """Each row is what the model with its adapter alone makes of it; what runs along a text may end in padding."""
    names = NAMES[: len(inputs["input_ids"])]
    got = served(**inputs, adapter_ids=served.adapter_ids(names))
    for row, name in enumerate(names):
        adapted.set_adapter(name or ())
        with torch.no_grad():
            want = adapted(**{key: value[row : row + 1] for key, value in inputs.items()})
        for key, value in want.items():
            own = got[key][row : row + 1][tuple(slice(size) for size in value.shape)]
            torch.testing.assert_close(own, value, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("roberta", "electra"))])
def test_rows_of_an_encoder_have_prompts_of_their_own(name: str, tmp_path: Path) -> None:
    adapted = adapted_by(name, RULES)
    adapted.export(tmp_path / "out", batched=list(RULES))
    served = runtime.load(tmp_path / "out")
    for batch, sequence in ((5, 6), (1, 1)):
        held_row_by_row(adapted, served, ZOO[name].inputs(batch, sequence, model=adapted.base))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rows_of_an_encoder_decoder_are_single_runs(name: str, tmp_path: Path) -> None:
    rules = RULES if name == "bart" else {"low": RULES["low"], "prompt": RULES["prompt"]}
    adapted = adapted_by(name, rules)
    report = adapted.export(tmp_path / "out", view="decode", batched=list(rules))
    assert report.inputs[f"encoder_model.{IDS}"] == report.inputs[f"decoder_model.{IDS}"] == ["batch"]
    served, given = runtime.load(tmp_path / "out"), texts()
    names = ["prompt", None, "low"]
    options = {**GREEDY, "num_beams": 2}
    got = served.generate(**given, **options, adapter_ids=served.adapter_ids(names))
    for row, own in enumerate(names):
        adapted.set_adapter(own or ())
        alone = {key: value[row : row + 1] for key, value in given.items()}
        assert torch.equal(got[row : row + 1], adapted.generate(**alone, **options))
    assert len({tuple(row.tolist()) for row in got}) == len(names)
    adapted.set_adapter(())
    assert torch.equal(served.generate(**given, **GREEDY), adapted.generate(**given, **GREEDY))


@pytest.mark.slow
def test_token_types_are_dropped_in_rows_that_have_a_prompt_alone(tmp_path: Path) -> None:
    config = hf.BertConfig(**TOKENS, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    adapted = transform(hf.BertModel(config).eval(), RULES["prompt"], "prompt", seed=0)
    adapted.add_adapter("low", RULES["low"], seed=0)
    stirred(adapted, "prompt", "low").export(tmp_path / "out", batched=["prompt", "low"])
    inputs = ZOO["bert"].inputs(3, 5, model=adapted.base)
    assert inputs["token_type_ids"].any()
    served = runtime.load(tmp_path / "out")
    got = served(**inputs, adapter_ids=torch.tensor([0, 1, -1])).last_hidden_state
    for row, own in enumerate(["prompt", "low", ()]):
        adapted.set_adapter(own)
        with torch.no_grad():
            want = adapted(**{key: value[row : row + 1] for key, value in inputs.items()}).last_hidden_state
        torch.testing.assert_close(got[row : row + 1, : want.shape[1]], want, atol=1e-4, rtol=1e-4)


class Denoises(nn.Module):
    """Returns what it takes, by the same name, as denoisers do; in ONNX the output is `sample.output`."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, sample: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"sample": self.outer(self.inner(sample)).sigmoid()}


def test_rows_of_an_output_with_the_name_of_an_input_are_each_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = {"sample": torch.randn(3, 6)}
    low = LoRA(r=2, target="all-linear", init_lora_weights=False)
    adapted = transform(Denoises().eval(), low, "one", inputs=inputs)
    adapted.add_adapter("two", low, seed=1)
    assert made_by_sigmoids(adapted.graph(inputs)) == {"sample.output"}
    adapted.export(tmp_path / "out", inputs=inputs, batched=["one", "two"])  # held against each alone
    got = runtime.load(tmp_path / "out")(**inputs, adapter_ids=["two", None, "one"])["sample.output"]
    for row, name in enumerate(("two", (), "one")):
        adapted.set_adapter(name)
        torch.testing.assert_close(got[row], adapted(**inputs)["sample"].detach()[row], atol=1e-5, rtol=1e-5)


def test_pieces_of_recordings_that_end_at_different_places_are_refused() -> None:
    seen: list[list[int]] = []
    step = CallRows(torch.tensor([1, 0])).beside(lambda inputs, _: seen.append(inputs[IDS].tolist()) or {})
    for rows in (2, 6):  # beams and samples of a row stand together
        step({"input_features": torch.zeros(rows, 8, 32)}, None)
    assert seen == [[1, 0], [1, 1, 1, 0, 0, 0]]
    with pytest.raises(PeftfxError, match="end at different places"):
        step({"input_features": torch.zeros(4, 8, 32)}, None)


def test_numbers_that_a_call_leaves_out_are_those_of_its_rows() -> None:
    """transformers guides a text by one without its prompt: each beam of a row has the row's adapter there, too."""
    rows = RowAdapters()
    rows._rows = KeptRows()
    with rows._numbering(torch.tensor([1, 0])):
        assert [rows.numbers_of(count).tolist() for count in (2, 6)] == [[1, 0], [1, 1, 1, 0, 0, 0]]


def test_an_image_has_the_adapter_of_the_row_that_its_token_is_in() -> None:
    """Rows have two images, none and one, of two pieces each."""
    images = Images(9, 3, torch.float32, 2, False, (("pixel_values", (1, 3, 4, 4)),))
    seen: list[list[int]] = []

    def encode(inputs: Mapping[str, Tensor], _: object) -> dict[str, Tensor]:
        seen.append(inputs[IDS].tolist())
        return {IMAGE_FEATURES: torch.zeros(2, 3)}

    one = EncodesImages()
    one.encode, one.images, one.numbers = encode, images, lambda rows: torch.arange(5, 5 + rows)
    text = torch.tensor([[9, 9, 1, 9, 9], [1, 2, 3, 4, 5], [1, 9, 9, 2, 3]])
    assert len(one.encoded({"pixel_values": torch.randn(3, 3, 4, 4)}, text)) == 3
    assert seen == [[5], [5], [7]]


def test_a_row_has_its_prompt_its_text_and_then_padding() -> None:
    text = torch.tensor([[1, 2, 3], [4, 5, 6]])
    laid = lay(text, torch.tensor([[2], [0]]), 2, 8, 9)
    assert laid.tolist() == [[8, 8, 1, 2, 3], [4, 5, 6, 9, 9]]


def test_prefixes_of_rows_are_refused_where_positions_are_not_theirs(tmp_path: Path) -> None:
    for name, view in (("bert", "forward"), ("t5", "decode")):
        adapted = adapted_by(name, {"prefix": PrefixTuning(num_virtual_tokens=2)})
        with pytest.raises(PeftfxError, match="its own prefix only in a decoder"):
            adapted.export(tmp_path / "out", view=view, batched=["prefix"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("lost", ["a16", pytest.param("a0", marks=FURTHER), pytest.param(None, marks=FURTHER)])
def test_each_of_many_adapters_has_a_row_that_is_compared(
    lost: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls had rows for eight adapters: the tensors of the others were in the graph, and no call read them."""
    names = [f"a{i}" for i in range(17)]
    adapted = transform(ZOO["bert"].build(), LoRA(r=1, target="attention.query"), names[0])
    for name in names[1:]:
        adapted.add_adapter(name, LoRA(r=1, target="attention.query"))
    for name in names:
        stirred(adapted, name)
    stacked = batched.stacks_of_rows

    def lossy(base: AdaptedModel, each: list[dict]) -> object:
        return stacked(base, [{} if name == lost else own for name, own in zip(names, each, strict=True)])

    monkeypatch.setattr(batched, "stacks_of_rows", lossy)
    if lost is None:
        assert adapted.export(tmp_path / "out", batched=names).comparisons
    else:
        with pytest.raises(VerificationError, match="disagrees"):
            adapted.export(tmp_path / "out", batched=names)
