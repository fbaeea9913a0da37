"""Two processes train, save, merge and export one adapter, and it is that of one process on the same batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sharded.accelerated import handed_out, wrapped_otherwise
from sharded.processes import LORA, in_two, llama
from sharded.work import alone, everything, methods, refused, resumed, tied, tokens

import peftfx
from peftfx.model.processes import gathered


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("two")
    return folder, in_two(everything, folder)


@pytest.mark.parametrize("way", ["ddp", "before", "adapted", "prompt", "without a graph", "ranks"])
def test_two_processes_train_what_one_does(seen: tuple[Path, list[dict[str, Any]]], way: str) -> None:
    assert all(max(found[way]) < 1e-5 for found in seen[1])
    assert seen[1][0]["kinds"] == ["DTensor"]


def test_what_is_saved_merged_and_exported_is_the_adapter_of_one_process(
    seen: tuple[Path, list[dict[str, Any]]],
) -> None:
    folder, both = seen
    _, one = alone(LORA)
    loaded = peftfx.load(llama(), folder / "adapter")
    torch.testing.assert_close(loaded.state_dict(), one.state_dict(), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        want = one.eval()(input_ids=torch.arange(3, 13)[None]).logits
    for found in both:
        assert found["tokens"].equal(tokens(one))
        torch.testing.assert_close(found["merged"], want, rtol=1e-4, atol=1e-5)
    assert both[0]["report"] == both[1]["report"]
    assert (folder / "onnx" / "model.onnx").is_file()


def test_one_process_alone_is_refused_before_it_waits_for_the_others(
    seen: tuple[Path, list[dict[str, Any]]],
) -> None:
    saved, exported = seen[1][0]["alone"]
    assert all("rank 1 has not called it" in said and "in every process" in said for said in (saved, exported))
    assert not (seen[0] / "none").exists()


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_gathers_a_tied_weight_once(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One process that gathers once more than the others waits for them for ever."""
    base, seen = llama(), list[int]()
    base.lm_head.weight = base.model.embed_tokens.weight
    monkeypatch.setattr(gathered, "is_part", lambda tensor: isinstance(tensor, torch.nn.Parameter))
    monkeypatch.setattr(gathered, "full", lambda tensor: seen.append(id(tensor)) or tensor.detach())
    monkeypatch.setattr(gathered, "rank", lambda: rank)
    with gathered.whole_base(base) as whole:
        assert (whole is not None) == (rank == 0)
    assert sorted(seen) == sorted({id(p) for p in base.parameters()})


@pytest.mark.further
def test_a_base_with_tied_weights_is_exported_and_merged(tmp_path: Path) -> None:
    both = in_two(tied, tmp_path)
    ids = torch.arange(3, 13)[None]
    for target in ("attention", "copy", "head"):
        with torch.no_grad():
            want = peftfx.load(llama(tied=True), tmp_path / target).eval()(input_ids=ids).logits
        for found in both:  # merged, or as it was where the merge is refused
            torch.testing.assert_close(found[f"{target} logits"], want)
    served = peftfx.runtime.load(tmp_path / "onnx")
    torch.testing.assert_close(served(input_ids=ids, attention_mask=ids * 0 + 1).logits, want)
    assert all(found["attention"] == "no error" for found in both)
    for target in ("copy", "head"):  # until now the copy was written, and the embedding had it too
        assert all("is one tensor with model.embed_tokens.weight" in found[target] for found in both)


@pytest.mark.slow
def test_every_method_trains_in_two_processes(tmp_path: Path) -> None:
    for found in in_two(methods, tmp_path):
        assert {name: differs for name, differs in found.items() if max(differs) > 1e-5} == {}


@pytest.mark.slow
def test_dcp_saves_and_resumes_the_adapter_alone(tmp_path: Path) -> None:
    for differs, names in in_two(resumed, tmp_path):
        assert differs < 1e-6
        assert all(name.startswith("adapters.default.") for name in names)


@pytest.mark.slow
def test_other_ways_are_refused_and_fsdp2_is_named(tmp_path: Path) -> None:
    for said in in_two(refused, tmp_path):
        assert all("FSDP2" in line for line in said[:1]), said
        assert all("each process has only a part of it" in line for line in said[1:]), said
        assert "its bias is one tensor with" in said[2]


@pytest.mark.slow
def test_accelerate_hands_out_what_the_first_process_has(tmp_path: Path) -> None:
    for found in in_two(handed_out, tmp_path):
        assert max(*found["lora"], *found["prompt"], *found["vera"]) < 1e-5
        assert found["lora saved"] == found["prompt saved"] == found["vera saved"] == ["adapters"]
        assert found["lora buffers"] == found["prompt buffers"] == found["vera buffers"] == [0, 1, 2]
        assert found["whole saved"] == ["adapters"]  # Accelerate did not ask


@pytest.mark.slow
def test_fsdp1_and_tensor_parallel_are_refused_by_name(tmp_path: Path) -> None:
    for said in in_two(wrapped_otherwise, tmp_path):
        parallel = said.pop("tensor parallel")
        assert all("FSDP1" in line and "fully_shard" in line for line in said.values()), said
        assert "tensor parallel" in parallel
        assert "fully_shard" in parallel
