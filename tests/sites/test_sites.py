"""Sites: the roles of every architecture of the zoo, whatever its modules are called.

`pytest -n 0 tests/sites/test_sites.py --update-golden` writes the golden file anew; read the difference before you
keep it.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
import transformers as hf
from laws.renaming import identity, renamed
from support.zoo import ZOO, Captured
from torch import Tensor, nn

import peftfx
from peftfx import LoRA
from peftfx.analysis.roles import find_sites
from peftfx.errors import PeftfxError
from peftfx.graph.graph import Graph
from peftfx.graph.places import whole_path
from peftfx.sites.site import Site
from peftfx.sites.sites import Sites
from peftfx.views.capture import capture

GOLDEN = Path(__file__).parent / "golden" / "sites.json"

#: What people call the layers of one role, as an oracle that has nothing to do with dataflow.
CONVENTIONS = {
    "attention.query": "q_proj query to_q q q_lin query_proj",
    "attention.key": "k_proj key to_k k k_lin key_proj",
    "attention.value": "v_proj value to_v v v_lin value_proj",
    "attention.qkv": "c_attn query_key_value qkv_proj Wqkv in_proj qkv",
    "attention.output": "o_proj out_proj_ o out_lin",
    "mlp.gate": "gate_proj wi_0",
    "mlp.up": "up_proj c_fc fc1 fc_in wi wi_1 lin1 dense_h_to_4h",
    "mlp.gate_up": "gate_up_proj",
    "mlp.down": "down_proj fc2 fc_out wo lin2 dense_4h_to_h",
    "embedding.token": "word_embeddings wte embed_tokens token_embedding",
    "embedding.position": "position_embeddings wpe embed_positions position_embedding relative_attention_bias",
    "embedding.type": "token_type_embeddings",
    "head": "lm_head qa_outputs",
}


@pytest.fixture(scope="module", params=ZOO)
def graph(request: pytest.FixtureRequest, captured: Callable[[str], Captured]) -> Graph:
    """Every model of the zoo in turn: of a wider scope than a test, so that tests of one model run together."""
    return captured(request.param).graph


@pytest.fixture
def gpt2(captured: Callable[[str], Captured]) -> Graph:
    return captured("gpt2").graph


def summary(sites: Sites) -> dict[str, dict[str, str]]:
    """Role -> path, its numbers starred -> how many sites, and the rows of its parts."""
    counts = Counter((site.role, re.sub(r"\b\d+\b", "*", site.path), parts_of(site)) for site in sites)
    found: dict[str, dict[str, str]] = {}
    for (role, path, parts), count in sorted(counts.items()):
        found.setdefault(role, {})[f"{path} {parts}".strip()] = f"x{count}"
    return found


def parts_of(site: Site) -> str:
    shown = (f"{part.role}={','.join(f'{a}:{b}' for a, b in part.rows)}" for part in site.parts)
    return " ".join(shown)


def test_roles_are_as_recorded(graph: Graph, request: pytest.FixtureRequest) -> None:
    name, golden = request.node.callspec.params["graph"], json.loads(GOLDEN.read_text())
    if request.config.getoption("update_golden"):
        golden[name] = summary(graph.sites)
        GOLDEN.write_text(json.dumps({name: golden[name] for name in ZOO}, indent=1) + "\n")
    assert summary(graph.sites) == golden[name]


def test_roles_agree_with_the_names_that_people_use(graph: Graph) -> None:
    expected = {word: role for role, words in CONVENTIONS.items() for word in words.split()}
    for site in graph.sites:
        word = site.path.rpartition(".")[2]
        assert site.role == expected.get(word, site.role), site.path


def test_roles_do_not_depend_on_names(graph: Graph) -> None:
    found = find_sites(renamed(graph))
    assert [identity(site) for site in found] == [identity(site) for site in graph.sites]
    assert all(site.path not in {s.path for s in graph.sites} for site in found if re.search("[a-z]", site.path))


def test_parts_of_a_fused_weight_are_disjoint_and_complete(graph: Graph) -> None:
    for site in graph.sites:
        rows = [row for part in site.parts for start, stop in part.rows for row in range(start, stop)]
        size = site.shape[1] if site.transposed else site.shape[0] if site.shape else 0
        assert not rows or sorted(rows) == list(range(size)), site.path


def test_labels_change_no_site(captured: Callable[[str], Captured]) -> None:
    llama = captured("llama")
    inputs = llama.entry.inputs(model=llama.model)
    labelled = capture(llama.model, {**inputs, "labels": inputs["input_ids"].clone()})
    assert places(labelled.sites) == places(llama.graph.sites)


def test_training_changes_no_site(gpt2: Graph) -> None:
    model = ZOO["gpt2"].build().train()
    assert places(capture(model, ZOO["gpt2"].inputs(model=model)).sites) == places(gpt2.sites)


def test_every_norm_that_has_a_weight_is_a_site(graph: Graph) -> None:
    named = {n for n, m in graph.base.named_modules() if "Norm" in type(m).__name__ and list(m.parameters())}
    assert {site.path for site in graph.sites.filter(role="norm")} == named


def test_attention_spelled_out_has_the_sites_of_fused_attention(captured: Callable[[str], Captured]) -> None:
    model = ZOO["llama"].build()
    model.set_attn_implementation("eager")  # type: ignore[operator]
    sites = capture(model, ZOO["llama"].inputs(model=model)).sites
    assert places(sites) == places(captured("llama").graph.sites)


def places(sites: Sites) -> list[tuple[object, ...]]:
    return [(site.path, site.kind, site.role, site.parts, len(site.calls)) for site in sites]


def test_tied_weights_are_two_sites_of_one_tensor(gpt2: Graph) -> None:
    words, head = gpt2.sites.by_path("transformer.wte"), gpt2.sites.by_path("lm_head")
    assert words.weight == head.weight
    assert (words.role, head.role) == ("embedding.token", "head")


def test_a_module_that_runs_twice_is_one_site_with_two_calls(captured: Callable[[str], Captured]) -> None:
    sites = captured("albert").graph.sites
    assert {len(site.calls) for site in (*sites.filter(role="mlp"), *sites.filter(role="attention"))} == {2}


def test_calls_of_conv1d_are_outside_the_views_around_it(gpt2: Graph) -> None:
    site = gpt2.sites.by_path("transformer.h.0.attn.c_attn")
    nodes = {node.name: node for node in gpt2.nodes()}
    x, op, y = (nodes[name] for name in (site.calls[0].x, site.calls[0].op, site.calls[0].y))
    assert site.transposed
    assert [node.meta["val"].ndim for node in (x, op, y)] == [3, 2, 3]


def test_work_grows_linearly_with_depth() -> None:
    shallow, deep = (steps(layers) for layers in (2, 8))
    assert deep < 4.4 * shallow


def steps(layers: int) -> int:
    """How many Python functions `find_sites` calls on a LLaMA of so many layers: a clock that never varies."""
    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_hidden_layers=layers)).eval()
    graph = capture(model, {"input_ids": torch.ones(2, 3, dtype=torch.long), "use_cache": False})
    count = 0

    def tick(frame: object, event: str, arg: object) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(tick)
    try:
        find_sites(graph)
    finally:
        sys.setprofile(None)
    return count


def test_sites_print_filter_and_become_json(gpt2: Graph) -> None:
    sites = gpt2.sites
    assert str(sites).startswith("18 sites: attention 2, attention.output 2, attention.qkv 2")
    assert [site.layer for site in sites.filter(role="attention.query")] == [0, 1]
    assert sites.filter(kind="embedding", layer=0) == Sites()
    assert sites.table().row_count == len(json.loads(json.dumps(sites.to_dict()))) == 18
    assert [match.site for match in sites.select("mlp & h.0.mlp.c_fc")] == [sites.by_path("transformer.h.0.mlp.c_fc")]


def test_a_path_without_a_site_names_the_nearest(gpt2: Graph) -> None:
    with pytest.raises(PeftfxError, match=r"did you mean 'transformer\.h\.0\.mlp\.c_fc'"):
        gpt2.sites.by_path("transformer.h.0.mlp.c_fx")


class Cut(nn.Module):
    """Runs parts of its lists alone, cut out as it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(5))
        self.tail = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[1:5:2]:
            x = layer(x)
        return self.tail[1:](x)


@pytest.mark.parametrize("road", ["modules", "graph"])
def test_modules_of_a_list_that_is_cut_have_their_own_paths(road: Literal["modules", "graph"]) -> None:
    base = Cut().eval()
    adapted = peftfx.transform(base, LoRA(r=2, target_modules=["tail.2"]), inputs={"x": torch.randn(2, 4)}, road=road)
    sites = adapted.graph(adapted=False).sites
    assert {"layers.1.0", "layers.3.0", "tail.1", "tail.2"} <= sites.called
    assert [site.path for site in sites] == ["layers.1.0", "layers.1.1", "layers.3.0", "layers.3.1", "tail.1", "tail.2"]
    assert sites.called <= dict(base.named_modules()).keys()


def test_the_paths_that_torch_writes_for_a_cut_list_are_read() -> None:
    paths = {"layers.slice(1, 5, 2).1.0": "layers.3.0", "tail.slice(1, None, None).2": "tail.2", "layers.2": "layers.2"}
    assert {path: whole_path(path, Cut()) for path in paths} == paths


def test_sites_of_each_family_have_a_type_and_a_list(captured: Callable[[str], Captured]) -> None:
    sites = captured("llama").graph.sites
    families = (sites.weights, sites.norms, sites.attentions)
    assert sorted(site.path for family in families for site in family) == sorted(site.path for site in sites)
    assert {site.kind for site in sites.weights} == {"embedding", "linear"}
    assert {site.kind for site in sites.norms} == {"norm"}
    assert sites.headed == sites.attentions
    assert all(site.heads.count % site.heads.kept == 0 for site in sites.headed)
    assert sites.weights_by_path["lm_head"] is sites.by_path("lm_head")
    assert len({tuple(site.to_dict()) for site in sites}) == 1, "rows of one table"
