"""Trained rows of embeddings, alone and beside a LoRA, are `peft`'s: in a tied head, in files, merged and served."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from support.adapted import randomise
from support.parity import farthest, outputs
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx.bases.guests import own_parameters
from peftfx.errors import PeftfxError, PeftfxWarning
from peftfx.export import OnnxModel
from peftfx.model import api
from peftfx.model.adapted import AdaptedModel
from peftfx.rules.peft_files import WEIGHTS

ROWS = [1, 5, 40]
ALONE = peft.TrainableTokensConfig(token_indices=ROWS)
SIZE = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def llama(*, tied: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = hf.LlamaConfig(vocab_size=64, num_hidden_layers=1, tie_word_embeddings=tied, **SIZE)
    return hf.LlamaForCausalLM(config).eval().to(dtype)


def beside(target: str, tokens: object = ROWS) -> peft.LoraConfig:
    return peft.LoraConfig(r=4, target_modules=[target], trainable_token_indices=tokens)


def trained(base: nn.Module, config: peft.PeftConfig, directory: Path) -> nn.Module:
    """`peft`'s model on a copy of the base, off its start, and saved."""
    theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).eval()
    randomise(theirs)
    theirs.save_pretrained(str(directory))
    return theirs


def call(rows: Sequence[int] = ROWS, batch: int = 2) -> dict[str, Tensor]:
    """Text with the trained tokens, and others, in it."""
    ids = torch.randint(64, (batch, 7), generator=torch.Generator().manual_seed(batch))
    ids[0, : len(rows)] = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "config"),
    [
        *(("gemma", config) for config in (ALONE, beside("q_proj"))),  # scaled, and tied
        *(("t5", config) for config in (ALONE, beside("q"))),  # three uses of one tensor
        ("t5", beside("q", {"embed_tokens": ROWS})),  # rows of each stack
        ("bert", beside("query")),
        ("llama", beside("q_proj", {"embed_tokens": ROWS, "lm_head": [2]})),
    ],
)
def test_what_peft_trained_computes_the_same_and_goes_back(
    name: str, config: peft.PeftConfig, bare: Callable[[str], AdaptedModel], tmp_path: Path
) -> None:
    ours, base = bare(name), ZOO[name].build()
    theirs = trained(base, config, tmp_path / "theirs")
    ours.load_adapter(tmp_path / "theirs", "default")
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    given = ZOO[name].inputs(3, 7, 5, model=base)
    given["input_ids"][0, :3] = torch.tensor(ROWS)
    want = outputs(theirs, given)
    assert farthest(outputs(ours, given), want, given) <= 1e-5
    assert farthest(outputs(again, given), want, given) <= 1e-5
    assert farthest(outputs(base, given), want, given) > 1e-3
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    ours.remove()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing")
@pytest.mark.parametrize("targets", [None, ["shared"], ["encoder.embed_tokens", "decoder.embed_tokens"]])
def test_rows_of_a_tied_embedding_are_those_of_all_that_is_tied_or_of_the_modules_that_are_named(
    targets: list[str] | None, bare: Callable[[str], AdaptedModel], tmp_path: Path
) -> None:
    ours, base = bare("t5"), ZOO["t5"].build()
    ours.add_adapter("default", peftfx.TrainableTokens(token_indices=ROWS, target_modules=targets))
    randomise(ours)
    given = ZOO["t5"].inputs(3, 7, 5, model=base)
    given["input_ids"][0, :3] = torch.tensor(ROWS)
    want = outputs(ours, given)
    ours.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base, str(tmp_path / "ours")).eval()
    assert farthest(outputs(theirs, given), want, given) <= 1e-5
    theirs.save_pretrained(str(tmp_path / "theirs"))
    mine, back = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    assert mine.keys() == back.keys()
    ours.remove()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tokens", [ROWS, {"embed_tokens": ROWS, "lm_head": [2, 3]}], ids=["shared", "apart"])
def test_merged_and_served_a_tied_head_has_its_rows(tokens: object, tmp_path: Path) -> None:
    base = llama(tied=True)
    theirs = trained(base, beside("q_proj", tokens), tmp_path / "theirs")
    want = outputs(theirs, call(batch=3))
    ours = peftfx.load(base, tmp_path / "theirs")
    for merge in (True, False):
        ours.export(tmp_path / f"onnx{merge}", merge=merge, view="forward")
        served = OnnxModel(tmp_path / f"onnx{merge}")(**call(batch=3))
        assert farthest(served, want, call(batch=3)) <= 1e-4
    ours.merge()
    merged = ours.remove()
    assert farthest(outputs(merged, call(batch=3)), want, call(batch=3)) <= 1e-5
    tied = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight  # type: ignore[operator]
    assert tied == (tokens is ROWS)


def test_a_tied_head_keeps_its_bias_which_peft_drops_until_it_is_merged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {name: number for name, number in SIZE.items() if name != "num_key_value_heads"}
    base = hf.BertForMaskedLM(hf.BertConfig(vocab_size=64, num_hidden_layers=1, **size)).eval()
    torch.nn.init.normal_(base.cls.predictions.bias)
    theirs = trained(base, beside("query", {"word_embeddings": ROWS}), tmp_path)
    said = (
        "HF PEFT gives other outputs at cls.predictions.decoder: its layer for trained rows leaves out the bias there"
    )
    with pytest.warns(PeftfxWarning, match=said):
        ours = peftfx.load(copy.deepcopy(base), tmp_path)
    with pytest.warns(PeftfxWarning, match=said):
        ours.save_pretrained(tmp_path / "again")
    for batch in (2, 1):
        inputs = call(batch=batch)
        with torch.no_grad():
            got, unmerged = ours(**inputs).logits, theirs(**inputs).logits
            merged = copy.deepcopy(theirs).merge_and_unload()(**inputs).logits
        torch.testing.assert_close(got, merged, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got, unmerged + base.cls.predictions.bias, atol=1e-5, rtol=1e-5)


def test_ten_steps_give_pefts_rows() -> None:
    base = llama(tied=True)
    theirs = peft.get_peft_model(copy.deepcopy(base), copy.deepcopy(ALONE))
    ours = peftfx.transform(base, ALONE)
    before = {name: p.clone() for name, p in base.named_parameters()}
    for model in (theirs, ours):
        model.train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(10):
            model(**call(), labels=call()["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    (want,) = (p for name, p in theirs.named_parameters() if "trainable_tokens_delta" in name)
    (got,) = ours.adapters.parameters()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert all(p.equal(before[name]) for name, p in own_parameters(base))


@pytest.fixture(scope="module")
def _tied() -> AdaptedModel:
    return api.bare(llama(tied=True))


@pytest.fixture
def tied(_tied: AdaptedModel) -> Iterator[AdaptedModel]:
    """`llama(tied=True)` captured once, without adapters."""
    yield _tied
    _tied.remove()


def test_two_adapters_have_rows_of_their_own_and_leave_none_behind(tied: AdaptedModel) -> None:
    adapted, base = tied, tied.base
    adapted.add_adapter("first", peftfx.TrainableTokens(token_indices=[1, 5]))
    adapted.add_adapter("second", peftfx.LoRA(target="attention.query", trainable_token_indices=[7]))
    adapted.add_adapter("third", peftfx.TrainableTokens(token_indices=[5]))
    for name in adapted.names():
        adapted.set_adapter(name)
        randomise(adapted)

    def logits() -> Tensor:
        return outputs(adapted, call([1, 5, 7]))["logits"]

    adapted.set_adapter(["first", "second"])
    both = logits()
    with pytest.raises(PeftfxError, match="'first' and 'third' both train their own copy"):
        adapted.set_adapter(["first", "third"])
    adapted.set_adapter("second")
    second = logits()
    assert not second.equal(both)
    with adapted.disable_adapter():
        assert logits().equal(outputs(base, call([1, 5, 7]))["logits"])
    adapted.set_adapter(["first", "second"])
    torch.testing.assert_close(logits(), both, rtol=0, atol=0)
    adapted.remove("first")
    assert logits().equal(second)


def test_in_bfloat16_rows_are_rounded_to_the_base_as_in_peft(tmp_path: Path) -> None:
    base = llama(dtype=torch.bfloat16)
    theirs = trained(base, ALONE, tmp_path)
    ours = peftfx.load(base, tmp_path)
    assert outputs(ours, call())["logits"].equal(outputs(theirs, call())["logits"])


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        (lambda: peftfx.TrainableTokens(), "no tokens are named"),
        (lambda: peftfx.TrainableTokens(token_indices=[64]), "outside the embedding's 64 rows"),
        (lambda: peftfx.TrainableTokens(token_indices=[3, 3]), "named twice"),
        (lambda: peftfx.LoRA(trainable_token_indices={"embed_token": [3]}), "no module with a weight has this name"),
        (
            lambda: peftfx.LoRA(trainable_token_indices=[3], modules_to_save=["embed_tokens"]),
            "this embedding is in modules_to_save and in trainable_token_indices",
        ),
        (lambda: peftfx.LoRA(trainable_token_indices=[3], target="head"), "trains some rows of this weight"),
    ],
)
def test_what_cannot_be_is_refused(rule: Callable[[], object], what: str, tied: AdaptedModel) -> None:
    with pytest.raises(PeftfxError, match=what):
        tied.add_adapter("default", rule())


def test_a_lora_at_a_head_goes_beside_trained_rows_unless_the_head_is_tied(tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2, trainable_token_indices=[3, 7])
    theirs = trained(llama(), config, tmp_path / "untied")
    ours = peftfx.load(llama(), tmp_path / "untied")
    assert outputs(ours, call([3, 5]))["logits"].sub(outputs(theirs, call([3, 5]))["logits"]).abs().max() < 1e-5
    trained(llama(tied=True), config, tmp_path / "tied")
    with pytest.raises(PeftfxError, match=r"rows of this weight.*another method.*\[lm_head\]"):
        peftfx.load(llama(tied=True), tmp_path / "tied")


def test_a_graph_for_many_adapters_says_that_it_has_no_place(tmp_path: Path) -> None:
    peftfx.export_onnx(llama(), tmp_path / "graph", view="decode", slots="all-linear")
    adapted = peftfx.transform(llama(), peftfx.TrainableTokens(token_indices=[1, 5]))
    randomise(adapted)
    with pytest.raises(PeftfxError, match=r"no place for a low-rank sum at model\.embed_tokens"):
        peftfx.export_adapter(adapted, tmp_path / "graph", tmp_path / "tokens")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", [ALONE, beside("q_proj")], ids=["alone", "beside a LoRA"])
def test_rows_of_a_base_in_16_bits_are_trained_in_float32_as_in_peft(
    config: peft.PeftConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    theirs = peft.get_peft_model(llama(tied=True, dtype=dtype), copy.deepcopy(config))
    theirs.save_pretrained(str(tmp_path / "start"))
    loaded = peftfx.load(llama(tied=True, dtype=dtype), tmp_path / "start")
    for model in (theirs, loaded):
        model.train()
        trained = [p for name, p in model.named_parameters() if "trainable_tokens_delta" in name]
        assert [p.dtype for p in trained if p.requires_grad] == [torch.float32]
        optimizer = torch.optim.SGD(trained, lr=1e-3)
        for _ in range(5):
            model(**call(), labels=call()["input_ids"]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_pretrained(str(tmp_path / type(model).__name__))
    mine, back = (load_file(tmp_path / type(model).__name__ / WEIGHTS) for model in (loaded, theirs))
    for name, tensor in mine.items():
        assert tensor.dtype == back[name].dtype == torch.float32
        torch.testing.assert_close(tensor, back[name], rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("tied", "dtype"),
    [
        pytest.param(True, torch.float16, marks=pytest.mark.slow),
        (False, torch.float16),
        pytest.param(True, torch.bfloat16, marks=pytest.mark.slow),
    ],
)
def test_rows_in_float32_act_in_the_16_bits_of_the_base(tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    base = llama(tied=tied, dtype=dtype)
    theirs = trained(base, beside("q_proj"), tmp_path / "theirs")
    for given in (call(batch=3), call([5], batch=1)):
        want = outputs(theirs, given)
        for road in ("modules", "graph"):
            ours = peftfx.load(copy.deepcopy(base), tmp_path / "theirs", road=road)
            got = outputs(ours, given)
            assert all(tensor.dtype == dtype for tensor in got.values())
            assert farthest(got, want, given) <= 2e-2
    for merge in (True, False):
        ours.export(tmp_path / f"onnx{merge}", merge=merge, view="forward")
        if dtype == torch.bfloat16:  # a CPU has no kernels: the export is verified by its twin in float32
            continue
        served = OnnxModel(tmp_path / f"onnx{merge}")(**call(batch=3))
        assert farthest(served, outputs(theirs, call(batch=3)), call(batch=3)) <= 3e-2
    ours.export(tmp_path / "decode")
    report = ours.merge()
    assert 0 < report.roundings["model.embed_tokens"].max_rel < 4e-3
    assert ours.remove().get_input_embeddings().weight.dtype == dtype  # type: ignore[operator]


def test_parameters_have_one_order_however_the_tokens_are_named(tmp_path: Path) -> None:
    """By this order an optimizer's state is resumed; a file has the names sorted."""
    tokens = {"lm_head": [1, 5], "embed_tokens": [2, 7, 9]}
    made = peftfx.transform(llama(), beside("q_proj", tokens))
    made.save_pretrained(tmp_path)
    given = peftfx.transform(llama(), beside("q_proj", dict(reversed(tokens.items()))))
    read = peftfx.load(llama(), tmp_path)
    names = [[name for name, _ in model.adapter("default").named_parameters()] for model in (made, given, read)]
    assert names[0] == names[1] == names[2]
    assert [name.split(".")[-2] for name in names[0][-2:]] == ["embed_tokens", "lm_head"]


@pytest.mark.parametrize("merge", [True, False])
def test_rows_alone_of_a_tied_model_are_exported(merge: bool, tmp_path: Path) -> None:
    """HF PEFT's file names the head, too, whose rows only repeat those of the embedding."""
    config = peft.TrainableTokensConfig(token_indices=list(ROWS), target_modules=["embed_tokens"])
    theirs = trained(llama(tied=True), config, tmp_path / "adapter")
    ours = peftfx.load(llama(tied=True), tmp_path / "adapter")
    ours.export(tmp_path / "out", view="forward", merge=merge)
    got, want = OnnxModel(tmp_path / "out")(**call()), outputs(theirs, call())
    assert farthest(got, want, call()) < 1e-5
