"""`peftfx inspect` and `peftfx methods` tell what there is and what rules would do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import networkx as nx
from support.command import Inputs, Result, assert_refused


class TestInspect:
    """The table of the places where adapters can act."""

    def test_a_config_is_enough(self, inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path) -> None:
        shutil.copy(inputs.classifier / "config.json", tmp_path)
        done = peftfx("inspect", tmp_path, "--json")
        assert done.code == 0, done.err
        sites = json.loads(done.out)
        roles = {site["path"]: site["role"] for site in sites}
        assert roles["bert.encoder.layer.1.attention.self.query"] == "attention.query"
        assert roles["classifier"] == "head"

    def test_the_table_shows_what_a_target_picks(self, inputs: Inputs, peftfx: Callable[..., Result]) -> None:
        done = peftfx("inspect", inputs.encoder, "--target", "attention.query")
        assert done.code == 0, done.err
        assert "path" in done.out.splitlines()[1]
        assert done.out.count("attention.self.query") == done.out.count("attention.query") == 2
        assert "self.value" not in done.out

    def test_what_matches_nothing_names_the_nearest(self, inputs: Inputs, peftfx: Callable[..., Result]) -> None:
        done = peftfx("inspect", inputs.encoder, "--target", "attention.kwery")
        assert_refused(done, "attention.kwery", "did you mean", "'attention.query'")

    def test_rules_are_planned_without_weights(
        self, inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path
    ) -> None:
        shutil.copy(inputs.classifier / "config.json", tmp_path)
        rules = "lora(r=4, modules_to_save=['classifier'])@attention.query; ia3@mlp.down"
        done = peftfx("inspect", tmp_path, "--rules", rules)
        assert done.code == 0, done.err
        assert "attention.query  2 sites, 512 parameters" in done.out
        assert "the target does not match its path or role" in done.out
        plan = json.loads(peftfx("inspect", tmp_path, "--rules", rules, "--json").out)
        assert plan["rules"][0]["skipped"]["it is in modules_to_save"] == ["classifier"]
        assert plan["rules"][1]["touched"] == {"mlp.down": {"places": 2, "parameters": 96}}
        assert plan["parameters"] == sum(rule["parameters"] for rule in plan["rules"])

    def test_rules_that_cannot_be_followed(self, inputs: Inputs, peftfx: Callable[..., Result]) -> None:
        inspect = lambda rules, *more: peftfx("inspect", inputs.encoder, "--rules", rules, *more)  # noqa: E731
        assert_refused(inspect("lorra"), "unknown method 'lorra'", "did you mean 'lora'")
        assert_refused(inspect("lora(rr=8)"), "no option 'rr'", "did you mean 'r'")
        assert_refused(inspect("lora@atention.query"), "matches no site", "'attention.query'")
        assert_refused(inspect("lora", "--target", "mlp"), "put the target into the rule")

    def test_the_network_is_printed_and_written(
        self, inputs: Inputs, peftfx: Callable[..., Result], tmp_path: Path
    ) -> None:
        done = peftfx("inspect", inputs.classifier, "--network", "--graphml", tmp_path / "sites.graphml")
        assert done.code == 0, done.err
        printed = nx.node_link_graph(json.loads(done.out), edges="edges")
        written = nx.read_graphml(tmp_path / "sites.graphml")
        assert set(printed.edges) == set(written.edges)
        assert written.nodes["classifier"]["role"] == "head"
        assert written.nodes["classifier"]["shape"] == "3x32"
        assert "tanh" in written.edges["bert.pooler.dense", "classifier"]["ops"]
        assert_refused(peftfx("inspect", inputs.classifier, "--network", "--target", "mlp"), "show all sites")
        assert_refused(peftfx("inspect", inputs.classifier, "--graphml", tmp_path / "no" / "x"), "cannot write")

    def test_a_missing_directory(self, peftfx: Callable[..., Result], tmp_path: Path) -> None:
        assert_refused(peftfx("inspect", tmp_path / "nowhere"), "no such directory", "nowhere")


class TestMethods:
    """`peftfx methods`: what a rule can say, read from the methods' own files."""

    def test_each_method_is_listed_and_each_of_its_options(self, peftfx: Callable[..., Result]) -> None:
        from peftfx.methods import methods

        listed = peftfx("methods").out
        for peft_type, cls in methods().items():
            assert f"{peft_type.lower()} " in listed
            (found,) = json.loads(peftfx("methods", peft_type.lower(), "--json").out)
            assert all(option["text"] for option in found["options"]), peft_type
            assert not any(">>>" in option["text"] for option in found["options"]), peft_type
            assert {option["name"] for option in found["options"]} <= set(cls.options())

    def test_one_method_in_words(self, peftfx: Callable[..., Result]) -> None:
        done = peftfx("methods", "LoRA")
        assert "r=8  (int) the rank." in done.out
        assert_refused(peftfx("methods", "lorra"), "did you mean 'lora'")
