"""Swappable adapters of encoder-decoders, and soft prompts as inputs of any number of virtual tokens."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import peft
import pytest
import torch
import transformers as hf
from support.adapted import randomise
from support.command import Result
from support.parity import apart
from support.slots import Deployed, deploy, stirred, texts
from support.zoo import TOKENS, ZOO

from peftfx import (
    IA3,
    LNTuning,
    LoRA,
    PeftfxError,
    PrefixTuning,
    PromptTuning,
    PTuning,
    export_onnx,
    runtime,
    transform,
)
from peftfx.export import OnnxModel
from peftfx.export.adapter_command import export_adapter_directories
from peftfx.export.slots.adapter_export import export_adapter
from peftfx.export.slots.prompt_places import capture_forward, find_forward, prompt_places_of
from peftfx.model.adapted import AdaptedModel
from peftfx.model.api import bare
from peftfx.passes import Evaluate, Merge
from peftfx.serving.adapter_file import read_adapter_file
from peftfx.views.encoder_decoder import Decoder, Encoder

pytestmark = pytest.mark.further

Run = Callable[..., Result]
PROMPTED = {
    "prompt_tuning": PromptTuning(num_virtual_tokens=5),
    "p_tuning": PTuning(num_virtual_tokens=3, encoder_hidden_size=16),
    "prefix_tuning": PrefixTuning(num_virtual_tokens=4),
    "prompt and lora": [PromptTuning(num_virtual_tokens=2), LoRA(r=2, target="attention.value | mlp.down")],
}
RULES = {
    "lora": LoRA(r=4, lora_alpha=7, target="all-linear"),
    "cross": LoRA(r=2, use_dora=True, target="/.*(EncDecAttention|encoder_attn).(q|k|v|q_proj|k_proj|v_proj)/"),
    "ia3": IA3(),
    "norms": LNTuning(),
    **PROMPTED,
}
LONG = ("p_tuning", "prompt and lora")
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return deploy("t5", tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    return deploy("bert", tmp_path_factory.mktemp("bert"))


def farthest(adapted: AdaptedModel, models: dict[str, OnnxModel]) -> float:
    """The largest difference of both graphs from the merged ones, where the masks show something."""
    worst = 0.0
    for name, model in models.items():
        view = adapted.view(name)
        assert isinstance(view, Encoder | Decoder)
        graph = adapted.graph(view=view)
        if adapted.active:
            graph = Evaluate()(Merge()(graph).graph).graph
        for i, sizes in enumerate(view.trials):
            case = view.inputs(adapted.base, sizes=sizes, seed=i)
            with torch.no_grad():
                want = dict(zip(graph.outputs, graph.run(*(case[s.name] for s in graph.inputs)), strict=True))
            got = model(**case)
            for output, value in want.items():
                pair = (view.shown(output, case, t) for t in (got[output], value))
                worst = max(worst, apart(*pair))
    return worst


def graphs_of(served: runtime.Served) -> dict[str, OnnxModel]:
    return {"encoder": served.graphs["encoder_model"], "decoder": served.graphs["decoder_model"]}


@pytest.mark.slow
@pytest.mark.parametrize("kind", RULES)
def test_an_encoder_decoder_with_a_file_for_each_graph_is_the_merged_model(
    t5: Deployed, kind: str, tmp_path: Path
) -> None:
    adapted, served = t5.with_rule(RULES[kind]), t5.served
    path = export_adapter(adapted, t5.root / "graph", tmp_path / "adapter", check=False)
    served.load_adapter(path)
    assert farthest(adapted, graphs_of(served)) < 1e-4
    assert torch.equal(served.generate(**texts(), **GREEDY), adapted.generate(**texts(), **GREEDY))
    served.set_adapter(None)
    with adapted.disable_adapter():
        assert farthest(adapted, graphs_of(served)) < 2e-6
        base = adapted.generate(**texts(), **GREEDY)
    assert torch.equal(served.generate(**texts(), **GREEDY), base)
    assert not torch.equal(adapted.generate(**texts(), **GREEDY), base)


def test_force_replaces_the_files_of_these_graphs_alone(t5: Deployed, tmp_path: Path) -> None:
    adapted = t5.with_rule(PROMPTED["prompt and lora"])
    path = export_adapter(adapted, t5.root / "graph", tmp_path / "adapter", check=False)
    export_adapter(adapted, t5.root / "graph", path, check=False, force=True)
    mine = shutil.copy(path / "encoder_model.onnx_adapter", path / "mine.onnx_adapter")
    with pytest.raises(PeftfxError, match=r"files were added .*: mine\.onnx_adapter"):
        export_adapter(adapted, t5.root / "graph", path, check=False, force=True)
    assert Path(mine).is_file()


def test_onnx_runtime_itself_puts_each_file_in(t5: Deployed, tmp_path: Path) -> None:
    adapted = t5.with_rule(PROMPTED["prompt and lora"])
    path = export_adapter(adapted, t5.root / "graph", tmp_path / "adapter", check=False)
    found = ort.LoraAdapter()
    found.Load(str(path / "encoder_model.onnx_adapter"))
    options = ort.RunOptions()
    options.add_active_adapter(found)
    encoder = str(t5.root / "graph" / "encoder_model.onnx")
    session = ort.InferenceSession(encoder, providers=["CPUExecutionProvider"])
    view, graph = adapted.view("encoder"), adapted.graph(view="encoder")
    assert view is not None
    case = view.inputs(adapted.base, sizes={"batch": 1, "encoder_sequence": 4})
    (got,) = session.run(["last_hidden_state"], {name: t.numpy() for name, t in case.items()}, options)
    want = graph.run(*(case[s.name] for s in graph.inputs))[0]
    assert got.shape[1] == 2 + 4
    assert np.abs(got - want.detach().numpy()).max() < 1e-4


def test_what_is_no_adapter_of_two_graphs_is_named_as_given(t5: Deployed, tmp_path: Path) -> None:
    served = runtime.load(t5.root / "graph")
    with pytest.raises(PeftfxError, match=r"no such adapter \[.*none\.onnx_adapter\]"):
        served.load_adapter(tmp_path / "none.onnx_adapter")
    t5.with_rule(PROMPTED["prompt_tuning"]).save_pretrained(tmp_path / "saved")
    with pytest.raises(PeftfxError, match="this is an adapter in HF PEFT's format"):
        served.load_adapter(tmp_path / "saved")


@pytest.mark.slow
def test_the_command_line_exports_and_runs_an_encoder_decoder(t5: Deployed, tmp_path: Path, peftfx: Run) -> None:
    t5.with_rule(PROMPTED["prompt_tuning"]).save_pretrained(tmp_path / "saved")
    graph, output = t5.root / "graph", tmp_path / "x.onnx_adapter"
    done = peftfx("export-adapter", "--adapter", tmp_path / "saved", "--for", graph, "--output", output, "--no-check")
    assert done.code == 0, done.err
    served = runtime.load(graph, adapter=output)
    assert torch.equal(served.generate(**texts(), **GREEDY), t5.adapted.generate(**texts(), **GREEDY))
    again = peftfx("export-adapter", "--adapter", tmp_path / "saved", "--for", graph, "--output", output)
    assert again.code == 2
    with pytest.raises(PeftfxError, match="this file is for one graph"):
        served.load_adapter(output / "encoder_model.onnx_adapter")
    (output / "decoder_model.onnx_adapter").unlink()
    with pytest.raises(PeftfxError, match="no such adapter"):
        served.load_adapter(output)


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] if k in LONG else []) for k in PROMPTED])
def test_an_encoder_takes_soft_prompts_in_its_forward(bert: Deployed, kind: str, tmp_path: Path) -> None:
    adapted = bert.with_rule(PROMPTED[kind])
    bert.served.load_adapter(export_adapter(adapted, bert.root / "graph", tmp_path / "adapter"))
    for batch, sequence in ((3, 9), (1, 1)):
        inputs = ZOO["bert"].inputs(batch, sequence, model=adapted.base)
        with torch.no_grad():
            want, base = adapted(**inputs).logits, adapted.base(**inputs).logits
        torch.testing.assert_close(bert.served(**inputs).logits, want, atol=1e-4, rtol=1e-4)
        assert float((want - base).abs().max()) > 1e-3
    bert.served.set_adapter(None)
    torch.testing.assert_close(bert.served(**inputs).logits, base, atol=1e-5, rtol=1e-5)


def test_a_classifier_of_peft_brings_its_prompt_and_its_head(bert: Deployed, tmp_path: Path) -> None:
    base = ZOO["bert"].build()
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    randomise(theirs)
    theirs.save_pretrained(str(tmp_path / "adapter"))
    path = export_adapter_directories([str(tmp_path / "adapter")], bert.root / "graph", tmp_path / "out", check=False)
    assert {"prompt", "classifier.weight"} <= read_adapter_file(path)[1].keys()
    bert.served.load_adapter(path, "theirs")
    for batch, sequence in ((3, 9), (1, 1)):
        inputs = ZOO["bert"].inputs(batch, sequence, model=base)
        with torch.no_grad():
            torch.testing.assert_close(bert.served(**inputs).logits, theirs(**inputs).logits, atol=1e-4, rtol=1e-4)
    bert.served.set_adapter(None)


@pytest.mark.parametrize(
    "name", ["bert", *(pytest.param(n, marks=pytest.mark.slow) for n in ("roberta", "deberta_v2", "t5", "bart"))]
)
def test_with_no_virtual_tokens_a_forward_is_the_base_to_the_last_bit(name: str) -> None:
    model = ZOO[name].build().eval()
    adapted = bare(model)
    places = tuple(prompt_places_of(model, adapted.sites))
    graph = capture_forward(model, adapted.example, places)
    for batch, sequence in ((2, 5), (1, 1)):
        inputs = ZOO[name].inputs(batch, sequence, model=model)
        case = {**inputs, **{place.what: place.rows(0, 0) for place in places}}
        with torch.no_grad():
            got = graph.run(*(case[spec.name] for spec in graph.inputs))
            base = adapted.graph(inputs)
            want = base.run(*(inputs[spec.name] for spec in base.inputs))
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["prompt_tuning", pytest.param("prefix_tuning", marks=pytest.mark.slow)])
def test_token_types_that_hf_peft_drops_under_a_prompt_count_without_one(kind: str) -> None:
    config = hf.BertConfig(**TOKENS, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48)
    model = hf.BertModel(config).eval()
    inputs = ZOO["bert"].inputs(2, 5, model=model)
    assert inputs["token_type_ids"].any()
    adapted = transform(model, PROMPTED[kind], "x", seed=0)
    places = tuple(prompt_places_of(model, adapted.sites))
    graph = capture_forward(model, inputs, places)
    (placement,) = adapted.adapter("x").placements.prompts
    rows = {place.what: place.rows(0, 0) for place in places}
    with torch.no_grad():
        virtual = placement.method.virtual(adapted.adapter("x").params(placement), False)
        own = {kind.partition("_")[0]: virtual}
        for case, want in (({**inputs, **rows}, model(**inputs)), ({**inputs, **rows, **own}, adapted(**inputs))):
            got = graph.run(*(case[spec.name] for spec in graph.inputs))[0]
            torch.testing.assert_close(got, want.last_hidden_state, atol=1e-6, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "view"), [("bart", "decode"), ("bart", "forward"), ("electra", "forward")])
def test_other_models_go_the_same_way(name: str, view: str, tmp_path: Path) -> None:
    model = ZOO[name].build()
    export_onnx(model, tmp_path / "graph", view=view, slots="all-linear")
    for kind in ("lora", "ia3", "prompt_tuning", "prefix_tuning"):
        adapted = stirred(transform(model, RULES[kind], "x", seed=0), "x")
        export_adapter(adapted, tmp_path / "graph", tmp_path / kind)  # held against torch
        adapted.remove()


def test_a_prefix_beside_which_a_model_computes_something_else_has_no_place(tmp_path: Path) -> None:
    """T5Gemma's decoder hides padding by its token, but not beside a cache, in which a prefix comes."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    part = hf.T5GemmaModuleConfig(**TOKENS, **sizes, head_dim=8, intermediate_size=16)
    config = hf.T5GemmaConfig(encoder=part, decoder=part, vocab_size=99, pad_token_id=TOKENS["pad_token_id"])
    model = hf.T5GemmaForSequenceClassification(config).eval()
    export_onnx(model, tmp_path / "graph", view="forward", slots="all-linear")
    served = runtime.load(tmp_path / "graph")
    assert "prefix" not in served.model.slots
    assert "prompt" in served.model.slots
    ids = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(0))
    ids[0, 3], ids[1, 0] = TOKENS["pad_token_id"], TOKENS["pad_token_id"]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        torch.testing.assert_close(served(**given).logits, model(**given).logits, atol=1e-4, rtol=1e-4)


class Rolled(hf.LlamaForCausalLM):
    """A model that computes something else behind tokens in a cache, as Kosmos-2, which then leaves images out."""

    def forward(self, input_ids: torch.Tensor, attention_mask: object = None, **given: object) -> object:
        states = self.model.embed_tokens(input_ids)
        if any(isinstance(value, hf.Cache) and value.get_seq_length() > 0 for value in given.values()):
            states = states.roll(1, -1)
        return super().forward(inputs_embeds=states, attention_mask=attention_mask, **given)


def test_a_prefix_has_no_place_if_the_code_asks_whether_there_are_tokens_before() -> None:
    """A graph has the answer for a filled cache; the export was refused."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = Rolled(hf.LlamaConfig(**TOKENS, **sizes)).eval()
    ids = torch.randint(5, 90, (2, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = find_forward(model, inputs, tuple(prompt_places_of(model, bare(model).sites)), bare(model, inputs).graph())
    assert found is not None
    graph, taken = found
    assert [place.what for place in taken] == ["prompt"]
    with torch.no_grad():
        (got, *_), want = graph.run(ids, inputs["attention_mask"], taken[0].rows(0, 0)), model(**inputs).logits
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_virtual_tokens_count_in_the_length_at_which_a_model_branches(tmp_path: Path) -> None:
    """Doge's code chooses keys where a text, with what is before it, is longer than the window."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = hf.DogeConfig(**TOKENS, **sizes, keep_window_size=32, max_position_embeddings=32)
    report = export_onnx(hf.DogeForCausalLM(config).eval(), tmp_path / "graph", view="forward", slots="all-linear")
    told = [line.partition(" (")[0] for line in report.sizes]
    assert told == ["sequence <= 32", "prefix + prompt + sequence <= 32"]


def test_a_prompt_has_no_place_if_it_would_fix_the_number_of_windows(tmp_path: Path) -> None:
    """LED attends in windows, here of 16 tokens; the export ended in an error of torch's at a text of two windows."""
    sizes = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "attention_window": 16}
    model = hf.LEDForQuestionAnswering(hf.LEDConfig(**TOKENS, **sizes, **layers)).eval()
    export_onnx(model, tmp_path / "graph", slots="all-linear")
    ids = torch.randint(5, 90, (2, 37))
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :4]}
    with torch.no_grad():
        want = model(**given)
    got = OnnxModel(tmp_path / "graph")(**given)
    torch.testing.assert_close(got["start_logits"], want.start_logits, atol=1e-5, rtol=1e-4)


class Some(hf.LlamaModel):
    """A model that gives some states, and None in place of the others, as DeepSeek-VL's hybrid does."""

    def forward(self, input_ids: object = None, attention_mask: object = None, **given: object) -> object:
        out = super().forward(input_ids=input_ids, attention_mask=attention_mask, **given)
        out.hidden_states = (None, out.last_hidden_state * 2)
        return out


def test_outputs_that_are_none_are_passed_over(tmp_path: Path) -> None:
    """The export ended in an `AttributeError`."""
    size = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    model = Some(hf.LlamaConfig(vocab_size=99, **size)).eval()
    export_onnx(model, tmp_path / "out", view="forward", slots="attention.query")
    ids = torch.arange(3, 13).view(2, 5)
    got = OnnxModel(tmp_path / "out")(input_ids=ids, attention_mask=torch.ones_like(ids))
    with torch.no_grad():
        torch.testing.assert_close(got["hidden_states.1"], model(ids).hidden_states[1], rtol=1e-4, atol=1e-5)
