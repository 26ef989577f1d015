"""The heads: what turns a backbone's features into one task's prediction."""

from torch import Tensor, nn

from coterie.models.tasks import Task, TaskKind

# Shapes: B batch, D features.


class BinaryHead(nn.Linear):
    """One logit a sample: features [B, D] -> logits [B]; above 0 means yes."""

    def __init__(self, features: int) -> None:
        super().__init__(features, 1)

    def forward(self, features_BD: Tensor) -> Tensor:
        """Give the logits [B] of `features_BD`."""
        return super().forward(features_BD).squeeze(-1)


def build_head(task: Task, features: int) -> nn.Module:
    """Build a fresh head for `task` on `features` numbers a sample, drawn from torch's global generator.

    Raises:
        ValueError: If there is no head for the task's kind.
    """
    if task.kind is not TaskKind.BINARY:
        raise ValueError(
            f"kind: must be {TaskKind.BINARY.value!r}, found {task.kind.value!r} of {task.name!r}"
        )
    return BinaryHead(features)
