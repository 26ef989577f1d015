"""Static networks made by hand: together they hold a layer of each kind."""

import torch

from coterie.models.graph import node
from coterie.models.static import Graph, StaticNetwork
from coterie.models.tasks import Task, TaskKind, TaskSet

MAP_TASKS = TaskSet(
    [
        Task(name="left parity", kind=TaskKind.BINARY, weight=0.5),
        Task(name="normals", kind=TaskKind.NORMALS, outputs=3, loss="l1"),
        Task(name="λ.depth", kind=TaskKind.DEPTH, metric="rmse"),
        Task(name="relu", kind=TaskKind.MULTICLASS, outputs=5),  # named as a layer is
        Task(
            name="input", kind=TaskKind.REGRESSION, outputs=5
        ),  # named as the input is, and of one answer with the last
    ]
)
TOKEN_TASKS = TaskSet(
    [
        Task(name="class", kind=TaskKind.MULTICLASS, outputs=3, metric="f1"),
        Task(name="places", kind=TaskKind.SEGMENTATION, outputs=4),
    ]
)


def map_graph() -> Graph:
    nodes = (
        node("image", "image", "input"),
        node("conv", "conv", "image", inputs=1, outputs=6, kernel=3, padding=2, dilation=2, bias=True),
        node("bn", "batch_norm", "conv", channels=6),
        node("relu", "relu", "bn"),
        node("random", "random_conv", "relu", channels=6, kernel=3, padding=2, dilation=2),
        node("max", "max_pool", "random", kernel=3, stride=2, padding=1),
        node("avg", "avg_pool", "relu", kernel=3, stride=2, padding=1),
        node("sub", "subsample", "relu", stride=2),
        node("add", "add", "max", "avg"),
        node("noise", "fixed_noise", "add", channels=6),
        node("all", "concat", "noise", "sub"),
        node("some", "slice", "all", start=2, length=7),
        node("picked", "select", "all", count=5),
        node("mix", "mix", "some", "picked", channels=9, parts=12),
        node("vector.mean", "space_mean", "mix"),
        node("vector.random", "random_projection", "vector.mean", inputs=9, outputs=4),
        node("vector.norm", "layer_norm", "vector.random", channels=4),
        node("vector.gelu", "gelu", "vector.norm"),
        node("vector.picked", "select", "vector.gelu", count=3),
        node("vector.mix", "mix", "vector.picked", channels=6, parts=3),
        node("heads.0.linear", "linear", "vector.mix", inputs=6, outputs=1),
        node("heads.0.squeeze", "squeeze", "heads.0.linear"),
        node("heads.1.conv", "conv", "mix", inputs=9, outputs=3, kernel=1),
        node("heads.1.upsample", "upsample", "heads.1.conv", height=8, width=12),
        node("heads.1.normalize", "normalize", "heads.1.upsample"),
        node("heads.2.conv", "conv", "mix", inputs=9, outputs=1, kernel=1),
        node("heads.2.upsample", "upsample", "heads.2.conv", height=8, width=12),
        node("heads.2.squeeze", "squeeze", "heads.2.upsample"),
        node("flat", "flatten", "mix"),
        node("heads.3.linear", "linear", "flat", inputs=9 * 4 * 6, outputs=5, bias=False),
    )
    answers = ("heads.0.squeeze", "heads.1.normalize", "heads.2.squeeze", "heads.3.linear", "heads.3.linear")
    return Graph(input_shape=(8, 12), nodes=nodes, outputs=dict(zip(MAP_TASKS.names, answers, strict=True)))


def token_graph() -> Graph:
    nodes = (
        node("patch", "conv", "input", inputs=3, outputs=8, kernel=4, stride=4, bias=True),
        node("tokens", "tokens", "patch"),
        node("embed", "class_token", "tokens", tokens=6, channels=8),
        node("norm", "layer_norm", "embed", channels=8),
        *(node(part, "linear", "norm", inputs=8, outputs=8) for part in "qkv"),
        node("attention", "attention", "q", "k", "v", heads=2),
        node("head", "slice", "attention", start=4, length=4),
        node("picked", "select", "attention", count=3),
        node("both", "concat", "head", "picked"),
        node("mix", "mix", "both", channels=8, parts=7),
        node("noise", "fixed_noise", "mix", channels=8),
        node("add", "add", "noise", "embed"),
        node("first", "first_token", "add"),
        node("grid", "grid", "add", height=2, width=3),
        node("linear", "linear", "first", inputs=8, outputs=3),
        node("conv", "conv", "grid", inputs=8, outputs=4, kernel=3, padding=1),
        node("upsample", "upsample", "conv", height=8, width=12),
    )
    return Graph(input_shape=(3, 8, 12), nodes=nodes, outputs={"class": "linear", "places": "upsample"})


def filled(graph: Graph) -> StaticNetwork:
    """Build a graph's network with weights, statistics and channel numbers all drawn."""
    torch.manual_seed(0)
    network = StaticNetwork(graph).eval()
    shapes = graph.shapes()
    for layer in network.nodes:
        for name, tensor in network.layer(layer.name).state_dict().items():
            if name == "index":
                shape = shapes[layer.inputs[0]]
                channels = layer.settings.get("channels", shape[-1] if len(shape) == 2 else shape[0])
                tensor.random_(0, int(channels))
            elif name == "running_var":
                tensor.uniform_(0.5, 2)
            elif tensor.is_floating_point():
                tensor.normal_(0, 0.5)
    return network
