"""Soft prompts where models differ: their start, classifiers, images and text, heads, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers as hf
from every_model.checks import build as tiny
from support.few import but_for
from support.parity import outputs
from support.soft_cases import (
    COUNT,
    PROMPT_TUNING,
    bare,
    build,
    close,
    close_all,
    heads,
    inputs_of,
)
from support.words import word_tokenizer
from support.zoo import ZOO

import peftfx
from peftfx import PeftfxError, PrefixTuning, PromptTuning, PTuning
from peftfx.bases.example_inputs import example_inputs
from peftfx.contract.sequence import PROMPT


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
    word_tokenizer({"[UNK]": 0, "a": 4, "b": 5, "c": 6}, unk_token="[UNK]").save_pretrained(directory)


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
        ("gpt2", lambda: PromptTuning(prompt_tuning_init="WORDS"), "unknown choice 'WORDS'"),
        ("gpt2", lambda: PromptTuning(prompt_tuning_init="TEXT"), "needs prompt_tuning_init_text"),
        ("gpt2", lambda: [PromptTuning(), PrefixTuning()], "two rules act here"),
        ("gpt2", lambda: PrefixTuning(num_layers=3), "num_layers=2, not 3"),
        ("deberta", lambda: PrefixTuning(), "keeps no keys and values"),
        ("gpt2", lambda: PrefixTuning(init_weights="one"), "unknown choice 'one'"),
        ("gpt2", lambda: PTuning(encoder_reparameterization_type="GRU"), "unknown choice 'GRU'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    name: str, rule: Callable[[], object], expected: str, request: pytest.FixtureRequest
) -> None:
    adapted = request.getfixturevalue("bare")(name)
    with pytest.raises(PeftfxError, match=expected):
        adapted.add_adapter("default", rule())


def test_a_prefix_needs_keys_and_values_in_every_layer() -> None:
    base = tiny("text-generation", "gemma3n_text")  # its last layers read those of others
    with pytest.raises(PeftfxError, match="2 of the model's 4 layers keep no keys and values of their own"):
        peftfx.transform(base, PrefixTuning())


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


@pytest.mark.parametrize("rows", [2, 9])  # with 9 rows the turned ids are as many as these
def test_virtual_tokens_are_refused_where_the_text_is_embedded_turned(rows: int) -> None:
    size = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 24}
    base = hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=40, **size)).eval()
    adapted = peftfx.transform(base, PromptTuning(num_virtual_tokens=3))
    with pytest.raises(PeftfxError, match=r"transposes its text before it embeds it.*transformer\.word_embedding"):
        adapted(input_ids=torch.arange(6 * rows).view(rows, 6) % 40)


class Twice(hf.LlamaForCausalLM):
    """Embeds its text a second time, as the code of Granite Speech, which writes sounds into the second."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> object:
        self.model.embed_tokens(input_ids)
        embedded = self.model.embed_tokens(input_ids)
        return super().forward(inputs_embeds=embedded, attention_mask=attention_mask, use_cache=False)


def test_a_text_that_is_embedded_twice_has_its_virtual_tokens_both_times(tmp_path: Path) -> None:
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = Twice(hf.LlamaConfig(vocab_size=40, **size)).eval()
    adapted = peftfx.transform(base, PromptTuning(num_virtual_tokens=3)).eval()
    ids = torch.arange(10).view(2, 5)
    with torch.no_grad():
        prompt = adapted.adapter("default").get("sequence.prompt_embeddings")
        embedded = torch.cat([prompt.expand(2, -1, -1), base.model.embed_tokens(ids)], 1)
        want = hf.LlamaForCausalLM.forward(base, inputs_embeds=embedded).logits
        torch.testing.assert_close(adapted(input_ids=ids).logits, want, rtol=1e-5, atol=1e-6)
    report = adapted.export(tmp_path / "out", view="forward")
    assert report.reference.startswith("the model's own code")
    served = peftfx.runtime.load(tmp_path / "out")
    torch.testing.assert_close(
        served(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, want, atol=1e-5, rtol=0
    )
