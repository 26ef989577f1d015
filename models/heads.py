"""The heads: what turns a backbone's features into one task's prediction."""

from collections.abc import Iterable, Sequence
from functools import lru_cache

from torch import Tensor, nn

from coterie.models.backbones import Backbone, Feature
from coterie.models.cost import Cost, chain_cost
from coterie.models.graph import INPUT, Chain, Node, node
from coterie.models.tasks import DENSE, Task, TaskKind

# Shapes: B batch, D features, C channels, H height, W width, O outputs.

DECODER_CHANNELS = 64  # at most: a decoder is as wide as what it reads, up to this


class Head(Chain):
    """One task's head; the outputs are, by kind:

    binary [B], multiclass [B, O], regression [B, O] or [B] where O is 1, segmentation [B, O, H, W], depth
    [B, H, W], normals [B, 3, H, W] of length 1, dense_regression [B, O, H, W] or [B, H, W] where O is 1;
    H and W are the input's.

    Attributes:
        reads: What `forward` takes: a vector [B, D] or a map [B, C, h, w].
    """

    def __init__(self, task: Task, backbone: Backbone) -> None:
        self.reads = feature_of(task)
        super().__init__(plan_head(task, backbone))


def feature_of(task: Task) -> Feature:
    """What a head of this task reads."""
    return "map" if task.kind in DENSE else "vector"


def plan_head(task: Task, backbone: Backbone) -> Sequence[Node]:
    """Describe the layers of a task's head.

    Raises:
        ValueError: If the backbone can't feed it.
    """
    shape = _feature_shape(task, backbone)
    if task.kind not in DENSE:
        linear = node("linear", "linear", INPUT, inputs=shape[0], outputs=task.outputs)
        scalar = task.kind is TaskKind.BINARY or (task.kind is TaskKind.REGRESSION and task.outputs == 1)
        return (linear, node("squeeze", "squeeze", "linear")) if scalar else (linear,)
    hidden = min(shape[0], DECODER_CHANNELS)
    height, width = backbone.input_shape[-2:]
    decoder = (
        node("conv1", "conv", INPUT, inputs=shape[0], outputs=hidden, kernel=3, padding=1),
        node("bn1", "batch_norm", "conv1", channels=hidden),
        node("relu1", "relu", "bn1"),
        node("conv2", "conv", "relu1", inputs=hidden, outputs=task.outputs, kernel=1, bias=True),
        node("upsample", "upsample", "conv2", height=height, width=width),
    )
    if task.kind is TaskKind.NORMALS:
        return (*decoder, node("normalize", "normalize", "upsample"))
    if task.outputs == 1:
        return (*decoder, node("squeeze", "squeeze", "upsample"))
    return decoder


def _feature_shape(task: Task, backbone: Backbone) -> tuple[int, ...]:
    try:
        return backbone.feature_shape(feature_of(task))
    except ValueError as error:
        raise ValueError(f"kind: {task.name!r} is a {task.kind.value} task: {error}") from error


class Necks(nn.ModuleDict):
    """What stands between a backbone and its heads: it turns the last unit's output into what heads read.

    No learned weights. Each form is computed once for all heads that read it.

    Args:
        backbone: Whose output it takes.
        tasks: Whose heads it feeds.

    Raises:
        ValueError: If the backbone can't feed one of them.
    """

    def __init__(self, backbone: Backbone, tasks: Iterable[Task]) -> None:
        for task in tasks:
            plan_head(task, backbone)
        features = dict.fromkeys(feature_of(task) for task in tasks)
        super().__init__({feature: Chain(backbone.neck(feature)) for feature in features})

    def forward(self, x: Tensor) -> dict[Feature, Tensor]:
        """Give each form of the last unit's output."""
        return {feature: neck(x) for feature, neck in self.items()}  # type: ignore[misc]


@lru_cache(maxsize=1024)
def head_cost(task: Task, backbone: Backbone) -> Cost:
    """Count a task's head; necks cost nothing. Allocates no weights.

    Raises:
        ValueError: If the backbone can't feed it.
    """
    return chain_cost(plan_head(task, backbone), backbone.feature_shape(feature_of(task)))
