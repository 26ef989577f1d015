import pytest
import torch

from coterie.models.backbones import BACKBONES, MLP, Backbone
from coterie.models.heads import Head, Necks, plan_head
from coterie.models.losses import task_losses
from coterie.models.metrics import Evaluator
from coterie.models.tasks import DENSE, KIND_METRICS, Task, TaskKind, TaskSet

# Shapes: B batch, H and W the input's sides.

BATCH, SIDES = 2, (16, 24)
OUTPUTS = {TaskKind.MULTICLASS: 5, TaskKind.SEGMENTATION: 5, TaskKind.NORMALS: 3, TaskKind.REGRESSION: 2}

# A task of each kind, and of those whose one output has no axis; with the shape of an output.
SHAPES: dict[Task, tuple[int, ...]] = {
    Task(name="binary", kind=TaskKind.BINARY): (BATCH,),
    Task(name="multiclass", kind=TaskKind.MULTICLASS, outputs=5): (BATCH, 5),
    Task(name="regression", kind=TaskKind.REGRESSION): (BATCH,),
    Task(name="regressions", kind=TaskKind.REGRESSION, outputs=2): (BATCH, 2),
    Task(name="segmentation", kind=TaskKind.SEGMENTATION, outputs=5): (BATCH, 5, *SIDES),
    Task(name="depth", kind=TaskKind.DEPTH): (BATCH, *SIDES),
    Task(name="normals", kind=TaskKind.NORMALS, outputs=3): (BATCH, 3, *SIDES),
    Task(name="edges", kind=TaskKind.DENSE_REGRESSION): (BATCH, *SIDES),
    Task(name="curvatures", kind=TaskKind.DENSE_REGRESSION, outputs=2): (BATCH, 2, *SIDES),
}
TASKS = TaskSet(SHAPES)


def backbone_named(name: str) -> Backbone:
    if name == "mlp":
        return MLP(input_shape=(3, *SIDES), width=8, depth=1)
    return BACKBONES[name](input_shape=(3, *SIDES), width=0.125)  # type: ignore[call-arg]


def fed_by(backbone: Backbone) -> TaskSet:
    return TaskSet(task for task in TASKS if backbone.name != "mlp" or task.kind not in DENSE)


def answers(backbone: Backbone, tasks: TaskSet) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(BATCH, *backbone.input_shape)
    for unit in backbone.build():
        x = unit(x)
    features = Necks(backbone, tasks)(x)
    heads = {task.name: Head(task, backbone) for task in tasks}
    return {name: head(features[head.reads]) for name, head in heads.items()}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_head_that_a_backbone_can_feed_has_its_kinds_output(name: str) -> None:
    backbone = backbone_named(name)
    tasks = fed_by(backbone)
    found = answers(backbone, tasks)
    assert {name: tuple(output.shape) for name, output in found.items()} == {
        task.name: SHAPES[task] for task in tasks
    }
    if "normals" in found:
        lengths_BHW = found["normals"].norm(dim=1)
        torch.testing.assert_close(lengths_BHW, torch.ones_like(lengths_BHW))


def test_a_heads_output_goes_with_its_losses_and_metrics() -> None:
    outputs = answers(backbone_named("cnn"), TASKS)
    targets = {
        task.name: torch.ones(BATCH, *SIDES, dtype=torch.int64)
        if task.kind is TaskKind.SEGMENTATION
        else torch.ones(BATCH, dtype=torch.int64)
        if task.kind is TaskKind.MULTICLASS
        else torch.ones(SHAPES[task])
        for task in TASKS
    }
    losses_T = task_losses(outputs, targets, TASKS)
    assert losses_T.shape == (len(TASKS),)
    assert losses_T.isfinite().all()
    evaluator = Evaluator(TASKS)
    evaluator.update(outputs, targets)
    found = evaluator.compute()
    assert {name: set(values) for name, values in found.items()} == {
        task.name: set(KIND_METRICS[task.kind]) for task in TASKS
    }


@pytest.mark.parametrize("kind", sorted(DENSE))
def test_a_dense_task_on_an_mlp_is_refused_by_its_name(kind: TaskKind) -> None:
    task = Task(name="map of it", kind=kind, outputs=OUTPUTS.get(kind, 1))
    message = f"kind: 'map of it' is a {kind.value} task: backbone: 'mlp' gives a vector"
    for build in (
        lambda: plan_head(task, backbone_named("mlp")),
        lambda: Head(task, backbone_named("mlp")),
        lambda: Necks(backbone_named("mlp"), [task]),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_a_form_of_the_features_is_there_only_where_a_head_reads_it() -> None:
    backbone = backbone_named("resnet20")
    assert set(Necks(backbone, fed_by(backbone_named("mlp")))) == {"vector"}
    assert set(Necks(backbone, [task for task in TASKS if task.kind in DENSE])) == {"map"}
    assert set(Necks(backbone, TASKS)) == {"vector", "map"}
    assert not list(Necks(backbone, TASKS).parameters())
