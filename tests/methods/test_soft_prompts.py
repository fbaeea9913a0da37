"""Soft prompts give `peft`'s numbers: forward, gradients, ten steps of training, files both ways, and ONNX Runtime."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from _pytest.mark.structures import ParameterSet
from safetensors.torch import load_file, save_file
from support.few import but_for
from support.parity import outputs
from support.soft_cases import (
    BOTH,
    CAUSAL,
    COUNT,
    ENCODERS,
    FEATURES,
    LSTM,
    MLP,
    PREFIX,
    PROJECTED,
    PROMPT_TUNING,
    Soft,
    bare,
    build,
    heads,
    inputs_of,
    task,
    trained,
)
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError, PrefixTuning, PromptTuning, PTuning
from peftfx.bases.example_inputs import example_inputs
from peftfx.contract.sequence import PROMPT
from peftfx.export import OnnxModel
from peftfx.export.command import export_directory
from peftfx.passes import Remove
from peftfx.rules.peft_files import STATE

#: T5 is proved where its files are exported; of models that place tokens alike, one has a prompt and one a prefix.
QUICK = {
    "prompt": {"gpt2", "bloom", "deberta", "bert"},
    "prefix": {"gpt2", "bloom", "llama", "gemma2", FEATURES},
}
KINDS = {"prompt": PROMPT_TUNING, "mlp": MLP, "lstm": LSTM, "prefix": PREFIX, "projected": PROJECTED}


def on(*names: str, kinds: Iterable[str] = KINDS, slow: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Soft prompts on models, `slow` ones not in every run; peft has no prefix for a classifier: features stand in."""

    def stand_in(kind: str, name: str) -> str:
        return FEATURES if name == "bert" and kind in ("prefix", "projected") else name

    pairs = [(kind, name) for kind in kinds for name in (*names, *(n for n in slow if n not in KINDS))]
    return pytest.mark.parametrize(
        ("soft", "name"), [of(k, stand_in(k, n), slow=n in slow or k in slow) for k, n in pairs]
    )


def each(*quick: str) -> pytest.MarkDecorator:
    """Each kind of soft prompt, some in every run."""
    return pytest.mark.parametrize("soft", [of(kind, slow=kind not in quick) for kind in KINDS])


def of(kind: str, *name: str, slow: bool) -> ParameterSet:
    """A soft prompt, on a model."""
    return pytest.param(KINDS[kind], *name, id="-".join((kind, *name)), marks=pytest.mark.slow if slow else ())


ABSOLUTE = 1e-5


def close(got: Tensor, want: Tensor, tolerance: float = ABSOLUTE) -> None:
    assert got.shape == want.shape
    error = float((got - want).detach().abs().max())
    assert error <= tolerance * max(1.0, float(want.abs().max())), error


def close_all(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float = ABSOLUTE) -> None:
    names = want.keys() - {"cache"}  # some models hand peft's prefix back
    assert got.keys() - {"cache"} == names
    for name in names:
        close(got[name], want[name], tolerance)


@pytest.mark.parametrize(
    ("soft", "name"),
    [
        of(kind, name, slow=name not in QUICK[kind])
        for kind, others in (("prompt", ENCODERS), ("prefix", (FEATURES,)))
        for name in (*CAUSAL, *others, *BOTH)
    ],
)
def test_the_forward_is_pefts(soft: Soft, name: str) -> None:
    theirs = soft.theirs(name)
    ours = soft.ours(theirs)
    for batch, sequence in ((3, 5), (1, 6)):
        inputs = inputs_of(name, batch, sequence)
        close_all(outputs(ours, inputs), outputs(theirs, inputs))
        with ours.disable_adapter():
            plain = outputs(ours, inputs)
        close_all(plain, outputs(bare(theirs), inputs))


@on("gpt2", slow=("bert", "t5", "lstm", "prefix"))
def test_ten_steps_are_those_of_peft(soft: Soft, name: str) -> None:
    theirs = soft.theirs(name)
    ours, want = soft.ours(theirs).train(), trained(theirs)
    got = dict(ours.adapter("default").named_parameters())
    assert got.keys() == want.keys()
    ours.base.apply(_without_dropout)
    theirs.train().apply(_without_dropout)
    inputs = inputs_of(name, 3, 6, labels=True)
    optimizers = [torch.optim.AdamW(list(p.values()), lr=1e-2) for p in (got, want)]
    for step in range(10):
        losses = [_loss(model(**inputs)) for model in (ours, theirs)]
        for loss, optimizer in zip(losses, optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
        if step == 0:
            for key in want:
                close(got[key].grad, want[key].grad)
            assert any(p.grad is not None for p in got.values())
            assert all(p.grad is None for p in ours.base.parameters())
        for optimizer in optimizers:
            optimizer.step()
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    close_all({k: p.detach() for k, p in got.items()}, {k: p.detach() for k, p in want.items()})


def _loss(output: Any) -> Tensor:
    return output.last_hidden_state.square().mean() if output.get("loss") is None else output.loss


def _without_dropout(module: nn.Module) -> None:
    if isinstance(module, nn.Dropout):
        module.p = 0.0
    if isinstance(getattr(module, "dropout", None), float):
        module.dropout = 0.0


@on("gpt2", "bert", kinds=("prompt", "prefix"), slow=("t5",))
def test_files_cross_in_both_directions(soft: Soft, name: str, tmp_path: Path) -> None:
    theirs = soft.theirs(name)
    base = bare(theirs)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    inputs = inputs_of(name, 3, 5)
    want = outputs(theirs, inputs)
    ours = peftfx.load(copy.deepcopy(base), tmp_path / "theirs")
    close_all(outputs(ours, inputs), want)
    ours.save_pretrained(tmp_path / "ours")
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / "ours")).eval()
    close_all(outputs(back, inputs), want)
    mine, given = (load_file(tmp_path / d / "adapter_model.safetensors") for d in ("ours", "theirs"))
    assert mine.keys() == given.keys()
    assert all(torch.equal(mine[key], given[key]) for key in given)


@on("gpt2", kinds=("mlp", "lstm", "projected"), slow=("mlp",))
def test_an_encoder_is_kept_beside_the_prompt_that_peft_reads(soft: Soft, name: str, tmp_path: Path) -> None:
    theirs = soft.theirs(name)
    base, inputs = bare(theirs), inputs_of(name, 3, 5)
    want = outputs(theirs, inputs)
    ours = soft.ours(theirs)
    ours.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    close_all(outputs(back, inputs), want)
    again = peftfx.load(copy.deepcopy(base), tmp_path)
    assert dict(again.adapter("default").named_parameters()).keys() == trained(theirs).keys()
    close_all(outputs(again, inputs), want)

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: 2 * t for k, t in tensors.items()}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    moved = peftfx.load(copy.deepcopy(base), tmp_path)  # the prompt is no longer the encoder's
    assert list(dict(moved.adapter("default").named_parameters())) == [f"sequence.{PROMPT}"]
    moved.save_pretrained(tmp_path)
    assert not (tmp_path / STATE).exists()


@on("t5", kinds=("prompt", "prefix"), slow=("gpt2", "bert"))
def test_what_peft_wrote_is_exported_as_peft_computes_it(soft: Soft, name: str, tmp_path: Path) -> None:
    theirs = soft.theirs(name)
    base = bare(theirs)
    base.save_pretrained(tmp_path / "base")
    theirs.save_pretrained(str(tmp_path / "adapter"))
    report = export_directory(tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", task=task(name))
    assert len(report.folded) == 1
    served = OnnxModel(tmp_path / "out")
    for batch, sequence in ((3, 11), (1, 6)):
        inputs = inputs_of(name, batch, sequence)
        got, want = served(**inputs), outputs(theirs, inputs)
        for key in got:
            close(got[key], want[key], 1e-4)


@each("projected")
def test_a_trained_prompt_and_lora_are_exported_apart_and_merged(soft: Soft, tmp_path: Path) -> None:
    theirs = soft.theirs("llama")
    rule = soft.method(num_virtual_tokens=COUNT, **soft.options)
    ours = peftfx.transform(bare(theirs), [rule, peftfx.LoRA(r=3, target="attention.query | mlp")], seed=0)
    with torch.no_grad():
        for p in ours.adapters.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    inputs = ZOO["llama"].inputs(3, 9, 4, model=ours.base)
    want = outputs(ours.eval(), inputs)
    for merge in (True, False):
        report = ours.export(tmp_path / str(merge), merge=merge)
        assert bool(report.merged) is merge
        assert bool(report.folded) is merge
        close(OnnxModel(tmp_path / str(merge))(**inputs)["logits"], want["logits"], 1e-4)
    ours.save_pretrained(tmp_path / "saved")
    close(outputs(peftfx.load(bare(theirs), tmp_path / "saved"), inputs)["logits"], want["logits"])


def test_a_prompt_with_lora_is_a_lora_of_the_base_under_the_prompt() -> None:
    """peft cannot do both: its prompt on a base that its LoRA was merged into is the same."""
    theirs = PROMPT_TUNING.theirs("gpt2")
    rules = [PromptTuning(num_virtual_tokens=COUNT), peftfx.LoRA(r=3, target="attention | embedding.token")]
    ours = peftfx.transform(bare(theirs), rules, seed=0)
    with torch.no_grad():
        for p in ours.adapters.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    lora = peftfx.transform(bare(theirs), rules[1], seed=0)
    for key, value in lora.adapter("default").named_parameters():
        value.data.copy_(ours.adapter("default").get(key))
    lora.merge()
    again = PROMPT_TUNING.theirs("gpt2", lora.remove())
    with torch.no_grad():
        again.prompt_encoder["default"].embedding.weight.copy_(
            ours.adapter("default").get("sequence.prompt_embeddings")
        )
    inputs = ZOO["gpt2"].inputs(3, 5, 4, model=bare(theirs))
    close_all(outputs(ours.eval(), inputs), outputs(again, inputs))


@each("prefix")
def test_adapters_are_switched_and_removed(soft: Soft) -> None:
    theirs = [soft.theirs("gpt2"), soft.theirs("gpt2")]
    with torch.no_grad():
        for p in theirs[1].prompt_encoder.parameters():
            p.mul_(1.5)
    inputs = ZOO["gpt2"].inputs(3, 5, 4, model=bare(theirs[0]))
    ours = soft.ours(theirs[0])
    base = outputs(bare(theirs[0]), inputs)
    ours.add_adapter("second", soft.method(num_virtual_tokens=COUNT, **soft.options))
    for key, value in soft.ours(theirs[1]).adapter("default").named_parameters():
        ours.adapter("second").get(key).data.copy_(value)
    close_all(outputs(ours, inputs), outputs(theirs[1], inputs))
    ours.set_adapter("default")
    close_all(outputs(ours, inputs), outputs(theirs[0], inputs))
    with pytest.raises(PeftfxError, match="cannot both be ahead of the text"):
        ours.set_adapter(["default", "second"])
    with pytest.raises(PeftfxError, match="no place in the base's weights"):
        ours.merge()
    ours.add_adapter("lora", peftfx.LoRA(r=2))
    ours.set_adapter(["second", "lora"])
    close_all(outputs(ours, inputs), outputs(theirs[1], inputs))
    with ours.disable_adapter():
        close_all(outputs(ours, inputs), base)
    close_all(outputs(ours.remove(), inputs), base)


@on("gpt2", kinds=("prompt", "projected"), slow=("t5",))
def test_removing_a_prompt_leaves_the_program_that_it_was_put_into(soft: Soft, name: str) -> None:
    ours = soft.ours(soft.theirs(name))
    inputs = inputs_of(name, 3, 5)
    empty = ours.graphs.captured(inputs, ours.entry())
    assert Remove()(ours.graph(inputs)).graph.text() == empty.text()


def test_the_start_of_a_prompt_is_embeddings_of_the_vocabulary_or_of_a_text(tmp_path: Path) -> None:
    base = ZOO["gpt2"].build()
    table = base.get_input_embeddings().weight.detach()
    made = peftfx.transform(base, PromptTuning(num_virtual_tokens=5, prompt_tuning_init="SAMPLE_VOCAB"), seed=3)
    rows = made.adapter("default").get("sequence.prompt_embeddings").detach()
    assert all(any(torch.equal(row, word) for word in table) for row in rows)
    _tokenizer(tmp_path)
    rule = PromptTuning(
        num_virtual_tokens=5,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="a b c",
        tokenizer_name_or_path=str(tmp_path),
    )
    made = peftfx.transform(ZOO["gpt2"].build(), rule)
    assert torch.equal(made.adapter("default").get("sequence.prompt_embeddings"), table[torch.tensor([4, 5, 6, 4, 5])])


def _tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 4, "b": 5, "c": 6}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(directory)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_row_is_what_it_is_alone_where_a_classifier_pools_the_last_token(name: str) -> None:
    """peft hides the ids from the model, whose classifier then pools padding: a row's answer depends on the batch."""
    import transformers as hf

    kind = {"gpt2": hf.GPT2ForSequenceClassification, "llama": hf.LlamaForSequenceClassification}[name]
    torch.manual_seed(0)
    config = copy.deepcopy(ZOO[name].build().config)
    config.num_labels = 3
    model = kind(config).eval()
    ours = peftfx.transform(model, PromptTuning(num_virtual_tokens=COUNT), seed=0)
    ids = torch.randint(10, 90, (2, 7))
    ids[1, 4:] = config.pad_token_id
    mask = (ids != config.pad_token_id).long()
    both = ours(input_ids=ids, attention_mask=mask).logits
    alone = ours(input_ids=ids[1:, :4], attention_mask=mask[1:, :4]).logits
    close(both[1:], alone)
    theirs = peft.get_peft_model(model, peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=COUNT)).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(
            ours.adapter("default").get("sequence.prompt_embeddings")
        )
        close(theirs(input_ids=ids[1:, :4], attention_mask=mask[1:, :4]).logits, alone)
        assert float((theirs(input_ids=ids, attention_mask=mask).logits[1:] - alone).abs().max()) > 1e-3


CLASSIFIERS = {
    "bert": ("BertForSequenceClassification", "BertModel"),
    "electra": ("ElectraForTokenClassification", "ElectraModel"),
    "gpt2": ("GPT2ForSequenceClassification", "GPT2Model"),
    "questions": ("BertForQuestionAnswering", "BertModel"),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_a_prefix_of_a_classifier_is_the_backbones_behind_the_models_own_head(name: str) -> None:
    """peft raises for every classifier; its prefix on the backbone is what the classifier's head then reads."""
    import transformers as hf

    kind = getattr(hf, CLASSIFIERS[name][0])
    torch.manual_seed(0)
    config = copy.deepcopy(ZOO["bert" if name == "questions" else name].build().config)
    config.num_labels = 2 if name == "questions" else 3
    model = kind(config).eval()
    ours = peftfx.transform(model, PrefixTuning(num_virtual_tokens=COUNT), seed=0)
    prefix = ours.adapter("default").get(f"sequence.{PROMPT}")
    inputs = example_inputs(model, sizes={"batch": 3, "sequence": 5})
    inputs.pop("token_type_ids", None)
    got = next(iter(outputs(ours, inputs).values()))
    config = peft.PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=COUNT)
    theirs = peft.get_peft_model(getattr(model, model.base_model_prefix), config).eval()
    with torch.no_grad():
        theirs.prompt_encoder["default"].embedding.weight.copy_(prefix)
        hidden = theirs(**inputs)
        last = inputs["attention_mask"].sum(1) - 1
        want = {
            "bert": lambda: model.classifier(hidden.pooler_output),
            "electra": lambda: model.classifier(hidden[0]),
            "gpt2": lambda: model.score(hidden[0][torch.arange(3), last]),
            "questions": lambda: model.qa_outputs(hidden[0])[..., 0],
        }[name]()
    close(got, want)
    alone = {key: value[2:, :3] for key, value in inputs.items()}  # the last row, without its padding
    row = next(iter(outputs(ours, alone).values()))
    close(row, got[2:] if got.shape[1:2] != (5,) else got[2:, :3])


@pytest.mark.parametrize(
    ("method", "config"),
    [(PromptTuning, peft.PromptTuningConfig), (PrefixTuning, peft.PrefixTuningConfig)],
    ids=["prompt", "prefix"],
)
def test_a_model_of_images_and_text_has_it_in_its_language_model(
    method: type[peftfx.contract.sequence.SequenceMethod], config: type[peft.PeftConfig]
) -> None:
    """peft leaves it out, silently; the language model alone, under peft, is what BLIP-2 has then."""
    model = ZOO["blip2"].build()
    ours = peftfx.transform(model, method(num_virtual_tokens=COUNT), seed=0)
    inputs = ZOO["blip2"].inputs(3, 5, 4, model=model)
    got, plain = outputs(ours, inputs), outputs(model, inputs)
    under = peft.get_peft_model(model.language_model, config(task_type="CAUSAL_LM", num_virtual_tokens=COUNT)).eval()
    with torch.no_grad():
        under.prompt_encoder["default"].embedding.weight.copy_(ours.adapter("default").get(f"sequence.{PROMPT}"))
        model.language_model = under
        close(got["logits"], model(**inputs, use_cache=False).logits)
    assert float((got["logits"][:, -5:] - plain["logits"][:, -5:]).abs().max()) > 1e-3


@pytest.mark.parametrize(
    ("name", "rule", "expected"),
    [
        ("vit", lambda: PromptTuning(), "embeds no text"),
        ("gpt2", lambda: PromptTuning(num_virtual_tokens=0), "must be 1 or more"),
        ("gpt2", lambda: PromptTuning(target="mlp"), "has no target"),
        ("gpt2", lambda: PromptTuning(token_dim=31), "have 32 features, not 31"),
        ("gpt2", lambda: PromptTuning(prompt_tuning_init="WORDS"), "unknown initialisation 'WORDS'"),
        ("gpt2", lambda: PromptTuning(prompt_tuning_init="TEXT"), "needs prompt_tuning_init_text"),
        ("gpt2", lambda: [PromptTuning(), PrefixTuning()], "two rules act here"),
        ("gpt2", lambda: PrefixTuning(num_layers=3), "num_layers 2, not 3"),
        ("deberta", lambda: PrefixTuning(), "keeps no keys and values"),
        ("gpt2", lambda: PrefixTuning(init_weights="one"), "unknown start 'one'"),
        ("gpt2", lambda: PTuning(encoder_reparameterization_type="GRU"), "unknown encoder 'GRU'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    name: str, rule: Callable[[], object], expected: str, request: pytest.FixtureRequest
) -> None:
    adapted = request.getfixturevalue("bare")(name)
    with pytest.raises(PeftfxError, match=expected):
        adapted.add_adapter("default", rule())


@pytest.mark.parametrize("name", but_for({"electra", "distilbert"}, ["bert", "electra", "distilbert"]))
def test_a_head_that_was_not_trained_is_in_the_file_for_peft_and_is_not_trained_when_it_comes_back(
    name: str, tmp_path: Path
) -> None:
    base = build(name)
    head = next(n for n in ("classifier", "qa_outputs") if hasattr(base, n))
    ours = peftfx.transform(base, PromptTuning(num_virtual_tokens=COUNT), seed=0)
    ours.save_pretrained(tmp_path)
    inputs = inputs_of(name, 3, 5)
    want = outputs(ours, inputs)
    close_all(outputs(peft.PeftModel.from_pretrained(build(name), str(tmp_path)).eval(), inputs), want)
    again = peftfx.load(build(name), tmp_path)
    close_all(outputs(again, inputs), want)
    assert list(dict(again.adapter("default").named_parameters())) == [f"sequence.{PROMPT}"]

    fresh = build(name)
    with torch.no_grad():
        fresh.get_submodule(head).weight.mul_(2)  # another start of the head: the file's is the one that belongs
    other = peftfx.load(fresh, tmp_path)
    close_all(outputs(other, inputs), want)
    assert f"saved.{head}.weight" in dict(other.adapter("default").named_parameters())


def test_a_damaged_file_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    theirs = PROMPT_TUNING.theirs("bert")
    theirs.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_virtual_tokens": 5}))
    with pytest.raises(PeftfxError, match=r"\[4, 32\] in the file, \[5, 32\] in this model"):
        peftfx.load(bare(theirs), tmp_path)
    assert heads(theirs) == ["classifier"]
