"""Roles of layers in modules made for the purpose: what follows from the dataflow, and what must not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from peftfx.sites.site import Site
from peftfx.views.capture import capture


class Attend(nn.Module):
    """A residual block of attention and MLP; subclasses say how."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.k, self.v = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.q, self.o = nn.Linear(8, 16), nn.Linear(8, 8)
        self.a, self.b, self.out = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def attend(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(torch.relu(self.a(self.norm(x))))
        return self.out(self.norm(x + self.attend(self.norm(x))))


class Unprojected(Attend):
    def attend(self, x: Tensor) -> Tensor:
        return self.o(nn.functional.scaled_dot_product_attention(x, self.k(x), self.v(x)))


class GatedQuery(Attend):
    def attend(self, x: Tensor) -> Tensor:
        query, gate = self.q(x).chunk(2, -1)
        return self.o(nn.functional.scaled_dot_product_attention(query, self.k(x), self.v(x)) * gate.sigmoid())


class Router(Attend):
    """Softmax and a product behind it, and no attention: the weights of a mixture."""

    def attend(self, x: Tensor) -> Tensor:
        return self.o(self.k(x).softmax(-1) @ self.v(x).transpose(-1, -2) @ x)


class Expected(Attend):
    """Weights of values by a function of each score that is no softmax, and padding hidden by a product."""

    def attend(self, x: Tensor) -> Tensor:
        query, key = (nn.functional.normalize(t, dim=-1) for t in (self.q(x)[..., :8], self.k(x)))
        weights = (1 - torch.acos(query @ key.transpose(-1, -2)) / torch.pi) ** 9
        return self.o(nn.functional.normalize(weights @ self.v(x), dim=-1))


class Linear(Attend):
    """A product of three layers' values, with nothing in between."""

    def attend(self, x: Tensor) -> Tensor:
        return self.o(self.v(x) @ self.k(x).transpose(-1, -2) @ x)


class Experts(Attend):
    """A feed-forward behind a layer, whose weights are parameters of products."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Parameter(torch.randn(2, 8, 8)), nn.Parameter(torch.randn(2, 8, 8))

    def attend(self, x: Tensor) -> Tensor:
        return self.o((torch.relu(self.k(x)[:, None] @ self.first) @ self.second).sum(1))


class Landmarks(Attend):
    """Attention through two landmarks, and a convolution of the values over positions."""

    def attend(self, x: Tensor) -> Tensor:
        query, key, value = self.q(x)[..., :8], self.k(x), self.v(x)
        few, marks = query[:, :2], key[:, :2]
        there = (query @ marks.transpose(-1, -2)).softmax(-1) @ (few @ marks.transpose(-1, -2)).softmax(-1)
        mixed = nn.functional.conv1d(value.transpose(1, 2), torch.ones(8, 1, 3), padding=1, groups=8).transpose(1, 2)
        return self.o(there @ ((few @ key.transpose(-1, -2)).softmax(-1) @ value) + mixed)


class Joined(Attend):
    """Three layers joined, mixed over positions by a convolution of each channel, and split again."""

    def attend(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.q(x), self.k(x), self.v(x)], -1).transpose(1, 2)
        mixed = nn.functional.conv1d(joined, torch.ones(32, 1, 3), padding=2, groups=32)[..., : x.shape[1]]
        query, _, key, value = nn.functional.silu(mixed).transpose(1, 2).split(8, -1)
        return self.o(nn.functional.scaled_dot_product_attention(query, key, value))


class Indexed(Attend):
    """Queries from a latent that chooses tokens too, and keys and values from another latent of the same input."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.q_down, self.kv_down = nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(6, 3)
        self.q, self.kv, self.chosen = nn.Linear(4, 8), nn.Linear(3, 16), nn.Linear(4, 5)

    def attend(self, x: Tensor) -> Tensor:
        x = self.narrow(x)
        few = self.q_down(x)
        key, value = self.kv(self.kv_down(x)).split(8, -1)
        best = self.chosen(few).topk(3, -1).indices
        mask = torch.zeros(x.shape[0], x.shape[1], 5).scatter(-1, best, 1.0).bool()
        return self.o(nn.functional.scaled_dot_product_attention(self.q(few), key, value, attn_mask=mask))


class Convolved(nn.Module):
    """Two convolutions of size 1 over tokens, with one of each channel between them or none."""

    def __init__(self, *, mixed: bool) -> None:
        super().__init__()
        self.up, self.down, self.out = nn.Conv1d(8, 12, 1), nn.Conv1d(12, 8, 1), nn.Linear(8, 8)
        self.between = nn.Conv1d(12, 12, 3, padding=1, groups=12) if mixed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.down(torch.relu(self.between(self.up(x.transpose(1, 2))))).transpose(1, 2) + x).relu()


class Glu(Attend):
    def attend(self, x: Tensor) -> Tensor:
        return self.o(nn.functional.glu(self.q(x), -1))


class Bilinear(Attend):
    """Two layers multiplied and no activation: neither gates the other."""

    def attend(self, x: Tensor) -> Tensor:
        return self.o(self.k(x) * self.v(x))


def parts_of(site: Site) -> str:
    return " ".join(f"{part.role}={','.join(f'{a}:{b}' for a, b in part.rows)}" for part in site.parts)


def roles_of(model: nn.Module) -> dict[str, str]:
    sites = capture(model.eval(), {"x": torch.randn(2, 5, 8)}).sites
    return {site.path: f"{site.role} {parts_of(site)}".strip() for site in sites}


def test_a_query_without_projection_claims_no_layer_before_it() -> None:
    roles = roles_of(Unprojected())
    assert (roles["k"], roles["v"], roles["o"]) == ("attention.key", "attention.value", "attention.output")
    assert (roles["a"], roles["b"], roles["out"]) == ("mlp.up", "mlp.down", "head")


def test_only_the_rows_of_a_gated_query_that_are_the_query_are_its_part() -> None:
    roles = roles_of(GatedQuery())
    assert roles["q"] == "attention.query attention.query=0:8"
    assert roles["o"] == "attention.output"


def test_a_softmax_without_scores_is_no_attention() -> None:
    roles = roles_of(Router())
    assert "attention" not in " ".join(roles.values())


def test_another_function_of_each_score_than_softmax_makes_an_attention() -> None:
    roles = roles_of(Expected())
    assert (roles["q"], roles["k"]) == ("attention.query attention.query=0:8", "attention.key")
    assert (roles["v"], roles["o"]) == ("attention.value", "attention.output")
    sites = capture(Expected().eval(), {"x": torch.randn(2, 5, 8)}).sites
    assert not sites.attentions, "methods inside an attention add scores to a softmax"


def test_products_without_a_function_between_them_or_with_parameters_are_no_attention() -> None:
    for model in (Linear(), Experts()):
        assert "attention" not in " ".join(roles_of(model).values())


def test_the_output_of_attentions_that_are_multiplied_and_added_to_values_has_its_role() -> None:
    roles = roles_of(Landmarks())
    assert (roles["q"], roles["k"]) == ("attention.query attention.query=0:8", "attention.key")
    assert (roles["v"], roles["o"]) == ("attention.value", "attention.output")


def test_of_joined_and_split_layers_each_has_the_role_that_its_rows_reach() -> None:
    roles = roles_of(Joined())
    assert (roles["q"], roles["k"]) == ("attention.query attention.query=0:8", "attention.key")
    assert (roles["v"], roles["o"]) == ("attention.value", "attention.output")


def test_a_latent_of_queries_may_choose_tokens_too_and_the_input_of_latents_is_none() -> None:
    roles = roles_of(Indexed())
    assert (roles["q_down"], roles["kv_down"]) == ("attention.query_down", "attention.kv_down")
    assert (roles["narrow"], roles["q"]) == ("linear", "attention.query")


def test_convolutions_of_size_1_are_an_mlp_if_nothing_between_them_mixes_tokens() -> None:
    for mixed in (False, True):
        roles = roles_of(Convolved(mixed=mixed))
        assert (roles["up"], roles["down"]) == (("conv", "conv") if mixed else ("mlp.up", "mlp.down"))


def test_glu_gates_with_its_second_half() -> None:
    roles = roles_of(Glu())
    assert roles["q"] == "mlp.gate_up mlp.gate=8:16 mlp.up=0:8"
    assert roles["o"] == "mlp.down"


def test_a_product_without_activation_is_no_mlp() -> None:
    roles = roles_of(Bilinear())
    assert (roles["k"], roles["v"], roles["o"]) == ("linear", "linear", "linear")


def test_torch_multihead_attention_is_fused() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    sites = capture(model.eval(), {"src": torch.randn(2, 5, 8)}).sites
    fused = sites.by_path("self_attn.in_proj_weight")
    assert (fused.role, [part.rows for part in fused.parts]) == ("attention.qkv", [((0, 8),), ((8, 16),), ((16, 24),)])
    assert sites.by_path("self_attn.out_proj").role == "attention.output"


class SoftCapped(nn.Module):
    """Logits bounded by a scaled tanh, as in Gemma, and a pooled output behind a bare one, as in BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.logits, self.pooled = nn.Linear(8, 3), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.logits(x) / 30) * 30, torch.tanh(self.pooled(x))


def test_a_soft_cap_hides_no_head_and_an_activation_does() -> None:
    assert roles_of(SoftCapped()) == {"logits": "head", "pooled": "linear"}


class OneHead(nn.Module):
    """A query split off a shared projection of keys and values, shared by all heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.o = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        query = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        key, value = (t[:, None].expand(-1, 4, -1, -1) for t in self.kv(x).split(2, -1))
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return x + self.o(attended.transpose(1, 2).flatten(2))


def test_keys_and_values_of_one_layer_are_its_parts() -> None:
    roles = roles_of(OneHead())
    assert roles["kv"] == "attention.kv attention.key=0:2 attention.value=2:4"
    assert (roles["q"], roles["o"]) == ("attention.query", "attention.output")


class Routed(nn.Module):
    """Every expert meets every value, weighted; or values are picked by one number of each, which routes nothing."""

    def __init__(self, *, of_features: bool) -> None:
        super().__init__()
        self.scores, self.experts = nn.Linear(8, 4), nn.Parameter(torch.randn(4, 8, 8))
        self.out = nn.Linear(8, 8)
        self.of_features = of_features

    def forward(self, x: Tensor) -> Tensor:
        scores = self.scores(x).float()
        best, index = torch.topk(torch.softmax(scores, -1), 2, dim=-1 if self.of_features else 1)
        weights = torch.zeros_like(scores).scatter(-1 if self.of_features else 1, index, best)
        return self.out(torch.einsum("bte,btd,edf->btf", weights, x, self.experts))


def test_a_layer_whose_features_are_ranked_is_a_router_and_one_that_ranks_tokens_is_none() -> None:
    for of_features in (True, False):
        sites = capture(Routed(of_features=of_features).eval(), {"x": torch.randn(2, 5, 8)}).sites
        assert (sites.by_path("scores").role == "router") is of_features


class Chosen(nn.Module):
    """A gated feed-forward of the tokens that a mask chooses: how many they are is known in a call alone."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(8, 32), nn.Linear(16, 8)

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        gate, up = self.both(x[chosen]).chunk(2, -1)
        return x.masked_scatter(chosen[..., None], self.down(nn.functional.silu(gate) * up))


def test_layers_have_roles_where_a_mask_chooses_the_tokens() -> None:
    inputs = {"x": torch.randn(2, 5, 8), "chosen": torch.rand(2, 5) > 0.5}
    sites = capture(Chosen().eval(), inputs).sites
    both, down = sites.by_path("both"), sites.by_path("down")
    assert (both.role, down.role) == ("mlp.gate_up", "mlp.down")
    assert {part.role: part.rows for part in both.parts} == {"mlp.gate": ((0, 16),), "mlp.up": ((16, 32),)}


class Scaled(nn.Module):
    """A feed-forward whose output is multiplied by one number for each value, or by one that is added besides."""

    def __init__(self, *, multiplied: bool) -> None:
        super().__init__()
        self.up, self.down, self.scale, self.out = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 1), nn.Linear(8, 8)
        self.multiplied = multiplied

    def forward(self, x: Tensor) -> Tensor:
        y, scale = self.down(torch.relu(self.up(x))), torch.sigmoid(self.scale(x))
        return self.out(x + (scale * y if self.multiplied else scale + y)).relu()


def test_a_layer_that_scales_a_whole_feed_forward_is_its_output_gate() -> None:
    for multiplied in (True, False):
        sites = capture(Scaled(multiplied=multiplied).eval(), {"x": torch.randn(2, 5, 8)}).sites
        assert sites.by_path("down").role == "mlp.down"
        assert (sites.by_path("scale").role == "mlp.output_gate") is multiplied
