"""Soft prompts give `peft`'s numbers: forward, gradients, ten steps of training, files both ways, and ONNX Runtime."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from every_model.checks import build as build_model
from safetensors.torch import load_file, save_file
from support.parity import outputs
from support.soft_cases import (
    BOTH,
    CAUSAL,
    COUNT,
    ENCODERS,
    FEATURES,
    PROMPT_TUNING,
    Soft,
    bare,
    close,
    close_all,
    each,
    inputs_of,
    of,
    on,
    shared,
    task,
    trained,
)
from support.zoo import ZOO
from torch import Tensor, nn

import peftfx
from peftfx import PeftfxError, PromptTuning
from peftfx.bases.example_inputs import example_inputs
from peftfx.contract.sequence import PROMPT
from peftfx.export import OnnxModel
from peftfx.export.command import export_directory
from peftfx.passes import Remove
from peftfx.rules.peft_files import STATE

#: T5 is proved where its files are exported; of models that place tokens alike, one has a prompt and one a prefix.
QUICK = {
    "prompt": {"bloom", "deberta", "bert"},
    "prefix": {"gpt2", "llama", "gemma2", FEATURES},
}


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
    ours = soft.ours(theirs, shared(name))
    for batch, sequence in ((3, 5), (1, 6)):
        inputs = inputs_of(name, batch, sequence)
        close_all(outputs(ours, inputs), outputs(theirs, inputs))
        with ours.disable_adapter():
            plain = outputs(ours, inputs)
        close_all(plain, outputs(bare(theirs), inputs))


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_hooks_at_the_embedding_see_the_text_alone_as_in_peft(name: str) -> None:
    theirs = PROMPT_TUNING.theirs(name)
    ours = PROMPT_TUNING.ours(theirs, shared(name))
    for batch, sequence in ((3, 5), (1, 6)):
        seen: list[tuple[list[int], Tensor]] = []
        for model, base in ((ours, ours.base), (theirs, theirs.base_model)):
            embedding = base.get_input_embeddings()
            lengths: list[int] = []
            before = embedding.register_forward_pre_hook(lambda _, args, at=lengths: at.append(args[0].shape[-1]))
            after = embedding.register_forward_hook(lambda _, args, y: y * torch.linspace(1, 2, y.shape[1])[:, None])
            seen.append((lengths, outputs(model, inputs_of(name, batch, sequence))["logits"]))
            before.remove()
            after.remove()
        assert seen[0][0] == seen[1][0]
        close(seen[0][1], seen[1][1])


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
            own = {id(p) for p in got.values()}  # a trained head is a child of the base's module
            assert {id(p) for p in ours.base.parameters() if p.grad is not None} <= own
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
    ours = shared(name)
    ours.remove()
    ours.load_adapter(tmp_path / "theirs", "default")
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
    ours = soft.ours(theirs, shared(name))
    ours.save_pretrained(tmp_path)
    back = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path)).eval()
    close_all(outputs(back, inputs), want)
    ours.load_adapter(tmp_path, "again")
    assert dict(ours.adapter("again").named_parameters()).keys() == trained(theirs).keys()
    close_all(outputs(ours, inputs), want)

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    save_file({k: 2 * t for k, t in tensors.items()}, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    ours.remove()
    ours.load_adapter(tmp_path, "default")  # the prompt is no longer the encoder's
    assert list(dict(ours.adapter("default").named_parameters())) == [f"sequence.{PROMPT}"]
    ours.save_pretrained(tmp_path)
    assert not (tmp_path / STATE).exists()


@pytest.mark.further
@on("t5", kinds=("prompt", "prefix"), slow=("gpt2", "bert", "prompt"))
def test_what_peft_wrote_is_exported_as_peft_computes_it(soft: Soft, name: str, tmp_path: Path) -> None:
    theirs = soft.theirs(name)
    base = bare(theirs)
    base.save_pretrained(tmp_path / "base")
    theirs.save_pretrained(str(tmp_path / "adapter"))
    report = export_directory(
        tmp_path / "base", tmp_path / "out", adapter=tmp_path / "adapter", task=task(name), view="forward"
    )
    assert len(report.folded) == 1
    served = OnnxModel(tmp_path / "out")
    for batch, sequence in ((3, 11), (1, 6)):
        inputs = inputs_of(name, batch, sequence)
        got, want = served(**inputs), outputs(theirs, inputs)
        for key in got:
            close(got[key], want[key], 1e-4)


@each("projected", "lstm")
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
        report = ours.export(tmp_path / str(merge), merge=merge, view="forward")
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
    other = soft.ours(theirs[1]).adapter("default")
    ours = soft.ours(theirs[0], shared("gpt2"))
    base = outputs(bare(theirs[0]), inputs)
    ours.add_adapter("second", soft.method(num_virtual_tokens=COUNT, **soft.options))
    for key, value in other.named_parameters():
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
    ours = soft.ours(soft.theirs(name), shared(name))
    inputs = inputs_of(name, 3, 5)
    empty = ours.graphs.captured(inputs, ours.entry())
    assert Remove()(ours.graph(inputs)).graph.text() == empty.text()


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_vl"])
def test_a_prompt_stands_before_texts_with_images(kind: str) -> None:
    """The base with embeddings gives it, if it is told the types and positions that it finds in tokens; `peft`'s is
    not told them."""
    base = build_model("image-text-to-text", kind).eval()
    inputs = example_inputs(base, seed=1)
    adapted = peftfx.transform(base, PromptTuning(num_virtual_tokens=3), seed=0).eval()
    prompt = adapted.adapter("default").get("sequence.prompt_embeddings").detach()
    rows, ahead = len(inputs["input_ids"]), adapted.entry().filler  # type: ignore[union-attr]

    def grown(name: str, value: int) -> Tensor:
        return torch.cat([torch.full((rows, 3), value), inputs[name]], 1)

    types = "token_type_ids" if kind == "gemma3" else "mm_token_type_ids"
    given = {name: t for name, t in inputs.items() if name not in ("input_ids", types)}
    given["attention_mask"] = grown("attention_mask", 1)
    if kind == "gemma3":
        given[types] = grown(types, 0)
    else:
        ids, kinds = grown("input_ids", ahead), grown(types, 0)
        given["position_ids"], _ = base.model.get_rope_index(
            ids, kinds, inputs["image_grid_thw"], attention_mask=given["attention_mask"]
        )
    with torch.no_grad():
        embedded = base.get_input_embeddings()(inputs["input_ids"])
        want = base(inputs_embeds=torch.cat([prompt.expand(rows, -1, -1), embedded], 1), **given).logits
        got = adapted(**inputs).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got[:, 3:] - base(**inputs).logits).abs().max() > 1e-2
