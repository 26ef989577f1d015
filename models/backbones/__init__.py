"""The backbones by name."""

from coterie.models.backbones.base import Backbone
from coterie.models.backbones.mlp import MLP

__all__ = ["BACKBONES", "MLP", "Backbone"]

BACKBONES: dict[str, type[Backbone]] = {backbone.name: backbone for backbone in (MLP,)}
