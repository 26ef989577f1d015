import math
from collections.abc import Mapping

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from coterie.models.graph import Chain, Node, check_nodes, infer_shapes, node
from coterie.models.layers import (
    GREATEST_SETTING,
    KINDS,
    Setting,
    build_layer,
    check_layer,
    settings_of,
)
from coterie.models.static import Graph, StaticNetwork
from tests.models.networks import filled, map_graph, token_graph

LINEAR = {"inputs": 3, "outputs": 4}


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("pickle", {}, "kind: must be one of .*, found 'pickle'"),
        ("linear", {"inputs": 3}, r"settings: 'linear' must have \['inputs', 'outputs'\]"),
        ("linear", {**LINEAR, "extra": 1}, r"may have \['bias'\], found"),
        ("linear", {**LINEAR, "inputs": 0}, "inputs: of 'linear' must be a whole number from 1 .* found 0"),
        ("linear", {**LINEAR, "inputs": GREATEST_SETTING + 1}, "inputs: of 'linear' must be a whole number"),
        ("linear", {**LINEAR, "inputs": 3.0}, "inputs: of 'linear' must be a whole number"),
        ("linear", {**LINEAR, "inputs": True}, "inputs: of 'linear' must be a whole number"),
        ("linear", {**LINEAR, "bias": 1}, "bias: of 'linear' must be true or false, found 1"),
        ("slice", {"start": -1, "length": 1}, "start: of 'slice' must be a whole number from 0"),
        ("relu", {"channels": 1}, r"settings: 'relu' must have \[\] and may have \[\], found \['channels'\]"),
    ],
)
def test_a_layer_that_breaks_a_rule_is_refused_by_name(
    kind: str, settings: Mapping[str, Setting], message: str
) -> None:
    for check in (check_layer, build_layer):
        with pytest.raises(ValueError, match=message):
            check(kind, settings)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_built_from_plain_numbers(kind: str) -> None:
    types = settings_of(kind)
    assert set(types.values()) <= {bool, int}
    assert isinstance(build_layer(kind, {name: form(2) for name, form in types.items()}), nn.Module)


@pytest.mark.parametrize("graph", [map_graph(), token_graph()], ids=["maps", "tokens"])
def test_inferred_shapes_are_those_of_the_values(graph: Graph) -> None:
    network = filled(graph)
    values: dict[str, tuple[int, ...]] = {}
    for layer in network.nodes:
        network.layer(layer.name).register_forward_hook(
            lambda module, inputs, value, name=layer.name: values.__setitem__(name, tuple(value.shape[1:]))
        )
    network(torch.randn(3, *graph.input_shape))
    assert graph.shapes() == {"input": graph.input_shape, **values}


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("", "relu", "input")], "name: must be letters"),
        ([node("a b", "relu", "input")], "name: must be letters"),
        ([node("a..b", "relu", "input")], "name: must be letters"),
        ([node("a.", "relu", "input")], "name: must be letters"),
        ([node("λ", "relu", "input")], "name: must be letters"),
        ([node("a\n", "relu", "input")], "name: must be letters"),
        ([node("input", "relu", "input")], "name: must be unique"),
        ([node("input.a", "relu", "input")], "name: must be unique"),
        ([node("a", "relu", "input"), node("a", "relu", "input")], "name: must be unique"),
        ([node("a", "relu", "input"), node("a.b", "relu", "input")], "name: must be unique"),
        ([node("a.b", "relu", "input"), node("a", "relu", "input")], "name: must be unique"),
        ([node("a.b.c", "relu", "input"), node("a.b", "relu", "input")], "name: must be unique"),
        ([node("a", "relu", "b"), node("b", "relu", "input")], "a: inputs must be earlier nodes"),
        ([node("a", "relu", "a")], "a: inputs must be earlier nodes"),
        ([node("a", "relu")], "a: 'relu' must have 1 inputs, found 0"),
        ([node("a", "add", "input")], "a: 'add' must have 2 inputs, found 1"),
        ([node("a", "concat")], "a: 'concat' must have one or more inputs, found 0"),
        ([node("a", "linear", "input", inputs=3)], "a: settings: 'linear' must have"),
    ],
)
def test_a_graph_that_breaks_a_rule_is_refused(nodes: list[Node], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_nodes(nodes, ())
    with pytest.raises(ValueError, match=message):
        Chain(nodes)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "forward",
            "training",
            "state_dict",
            "register_module",
            "_modules",
            "_steps",
            "a.forward",
            "a.training",
        ),
        *("nodes", "outputs", "output", "run", "layer", "graph", "graph.a", "reads", "empty", "from_state"),
    ],
)
def test_a_name_that_would_hide_an_attribute_of_a_module_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no reserved word"):
        check_nodes([node(name, "relu", "input")], ())


@given(st.lists(st.from_regex(r"[a-z_]{1,12}(\.[a-z_]{1,12}){0,2}", fullmatch=True), min_size=1, max_size=4))
def test_a_graph_that_passes_the_checks_can_be_built(names: list[str]) -> None:
    nodes = [node(name, "linear", "input", inputs=2, outputs=1) for name in names]
    try:
        check_nodes(nodes, ())
    except ValueError:
        return
    graph = Graph(
        input_shape=(2,), nodes=tuple(nodes), outputs={str(n): name for n, name in enumerate(names)}
    )
    network = StaticNetwork(graph)
    assert set(network.state_dict()) == {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    assert len(network(torch.zeros(3, 2))) == len(names)


def test_an_output_that_is_no_node_is_refused() -> None:
    with pytest.raises(ValueError, match="outputs: must be nodes, found 'b'"):
        check_nodes([node("a", "relu", "input")], ["a", "b"])


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([node("a", "linear", "input", inputs=5, outputs=1)], r"a: 'linear' can't take \[\(4, 6, 3\)\]"),
        ([node("a", "slice", "input", start=2, length=3)], "a: 'slice' can't take"),
        ([node("a", "max_pool", "input", kernel=9, stride=1)], "a: 'max_pool' can't take"),
        ([node("a", "conv", "input", inputs=4, outputs=1, kernel=9)], "a: 'conv' can't take"),
        ([node("a", "grid", "input", height=2, width=2)], "a: 'grid' can't take"),
        (
            [node("a", "conv", "input", **dict.fromkeys(("inputs", "outputs", "kernel"), GREATEST_SETTING))],
            "a: 'conv' can't take",
        ),
    ],
)
def test_a_layer_that_does_not_go_with_its_input_is_named(nodes: list[Node], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        infer_shapes(nodes, (4, 6, 3))


def test_shapes_of_any_size_are_inferred_without_memory_or_a_draw() -> None:
    before = torch.get_rng_state()
    size = GREATEST_SETTING
    nodes = [
        node("a", "linear", "input", inputs=size, outputs=size),
        node("b", "linear", "a", inputs=size, outputs=1),
    ]
    assert infer_shapes(nodes, (size,)) == {"input": (size,), "a": (size,), "b": (1,)}
    assert torch.equal(torch.get_rng_state(), before)
    upsampled = infer_shapes([node("a", "upsample", "input", height=size, width=size)], (1, 2, 2))
    assert math.prod(upsampled["a"]) == size**2


def test_a_chain_without_nodes_gives_what_it_gets() -> None:
    x = torch.randn(2, 3)
    assert Chain([])(x) is x
    assert infer_shapes([], (3,)) == {"input": (3,)}


def test_a_mix_adds_what_goes_to_one_place_and_leaves_the_others_at_zero() -> None:
    mix = build_layer("mix", {"channels": 4, "parts": 3})
    mix.load_state_dict({"weight": torch.tensor([1.0, 2.0, 0.5]), "index": torch.tensor([3, 0, 3])})
    expected = torch.tensor([[20.0, 0.0, 0.0, 1.0 + 50.0]])
    assert torch.equal(mix(torch.tensor([[1.0, 10.0]]), torch.tensor([[100.0]])), expected)
    maps = mix(torch.ones(2, 2, 5, 6), torch.ones(2, 1, 5, 6))
    assert torch.equal(maps[:, 3], torch.full((2, 5, 6), 1.5))
    tokens = mix(torch.ones(2, 7, 2), torch.ones(2, 7, 1))
    assert torch.equal(tokens[:, :, 0], torch.full((2, 7), 2.0))
