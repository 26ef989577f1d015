"""The backbones by name."""

from coterie.models.backbones.base import Backbone, Feature, Site, Unit
from coterie.models.backbones.cnn import CNN
from coterie.models.backbones.mlp import MLP
from coterie.models.backbones.resnet import ResNet18, ResNet20, ResNet50Dilated
from coterie.models.backbones.vit import ViTSmall, ViTTiny

__all__ = [
    "BACKBONES",
    "CNN",
    "MLP",
    "Backbone",
    "Feature",
    "ResNet18",
    "ResNet20",
    "ResNet50Dilated",
    "Site",
    "Unit",
    "ViTSmall",
    "ViTTiny",
]

BACKBONES: dict[str, type[Backbone]] = {
    backbone.name: backbone for backbone in (MLP, CNN, ResNet20, ResNet18, ResNet50Dilated, ViTTiny, ViTSmall)
}
