import pytest
import torch
from torch import nn

from coterie.models.graph import Chain, node
from coterie.models.static import Assembly, Graph, StaticNetwork

GRAPH = Graph(
    input_shape=(3,),
    nodes=(
        node("trunk", "linear", "input", inputs=3, outputs=4),
        node("trunk_relu", "relu", "trunk"),
        node("heads.0", "linear", "trunk_relu", inputs=4, outputs=2),
        node("heads.1", "linear", "trunk", inputs=4, outputs=1),
    ),
    outputs={"b": "heads.1", "a": "heads.0"},
)


def test_a_network_is_built_around_a_state_without_copying_or_drawing() -> None:
    state = StaticNetwork(GRAPH).state_dict()
    before = torch.get_rng_state()
    again = StaticNetwork.from_state(GRAPH, state)
    assert torch.equal(torch.get_rng_state(), before)
    assert {name: tensor.data_ptr() for name, tensor in again.state_dict().items()} == {
        name: tensor.data_ptr() for name, tensor in state.items()
    }
    assert not again.training
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_a_state_of_another_network_is_refused() -> None:
    state = StaticNetwork(GRAPH).state_dict()
    del state["trunk.bias"]
    with pytest.raises(RuntimeError, match=r"trunk\.bias"):
        StaticNetwork.from_state(GRAPH, state)


def test_an_empty_network_has_shapes_and_no_memory() -> None:
    before = torch.get_rng_state()
    empty = StaticNetwork.empty(GRAPH)
    assert torch.equal(torch.get_rng_state(), before)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert empty.get_parameter("heads.0.weight").shape == (2, 4)


def test_each_task_is_answered_by_its_node_in_the_tasks_order() -> None:
    network = StaticNetwork(GRAPH)
    x = torch.randn(5, 3)
    outputs = network(x)
    assert list(outputs) == ["b", "a"]
    trunk = network.layer("trunk")(x)
    assert torch.equal(outputs["b"], network.layer("heads.1")(trunk))
    assert torch.equal(outputs["a"], network.layer("heads.0")(trunk.relu()))


def test_a_graph_knows_who_uses_what() -> None:
    assert GRAPH.users() == {
        "trunk": ("b", "a"),
        "trunk_relu": ("a",),
        "heads.0": ("a",),
        "heads.1": ("b",),
    }
    assert GRAPH.shapes() == {
        "input": (3,),
        "trunk": (4,),
        "trunk_relu": (4,),
        "heads.0": (2,),
        "heads.1": (1,),
    }


def test_an_assembly_copies_weights_and_drops_what_no_task_reads() -> None:
    layer = nn.Linear(3, 4)
    assembly = Assembly((3,))
    used = assembly.add(node("used", "linear", "input", inputs=3, outputs=4), layer.state_dict())
    assembly.add(node("idle", "linear", "input", inputs=3, outputs=9), nn.Linear(3, 9).state_dict())
    network = assembly.finish({"a": assembly.add(node("relu", "relu", used))})
    assert [node.name for node in network.nodes] == ["used", "relu"]
    assert not network.training
    x = torch.randn(2, 3)
    expected = layer(x).relu()
    with torch.no_grad():
        layer.weight.add_(1)
    assert torch.equal(network(x)["a"], expected)


def test_an_assembly_computes_the_same_thing_once_but_never_merges_weights() -> None:
    assembly = Assembly((3,))
    first = assembly.add(node("first", "relu", "input"))
    assert assembly.add(node("second", "relu", "input")) == first
    assert assembly.add(node("third", "relu", first)) == "third"
    state = nn.Linear(3, 1).state_dict()
    heads = [assembly.add(node(name, "linear", first, inputs=3, outputs=1), state) for name in ("x", "y")]
    assert heads == ["x", "y"]


def test_an_assembly_takes_chains_one_behind_another() -> None:
    chains = [
        Chain([node("linear", "linear", "input", inputs=3, outputs=4), node("relu", "relu", "linear")]),
        Chain([]),
        Chain([node("linear", "linear", "input", inputs=4, outputs=2)]),
    ]
    assembly = Assembly((3,))
    middle = assembly.chains("a", chains[:2], "input")
    network = assembly.finish({"t": assembly.chains("b", chains[2:], middle)})
    assert [node.name for node in network.nodes] == ["a.linear", "a.relu", "b.linear"]
    x = torch.randn(4, 3)
    assert torch.equal(network(x)["t"], chains[2](chains[0](x)))
