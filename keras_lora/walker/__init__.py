"""Finding layers in a model: a walk over its tree, and what a `targets` argument selects."""

from keras_lora.walker.heads import backbone_of, is_backbone, output_heads
from keras_lora.walker.names import match_names, matches
from keras_lora.walker.targets import Target, all_targets, find_targets, select_targets
from keras_lora.walker.tree import (
    Layer,
    Node,
    Tree,
    all_layers,
    lora_layers,
    numbered,
    site_path,
    walk,
)

__all__ = [
    "Layer",
    "Node",
    "Target",
    "Tree",
    "all_layers",
    "all_targets",
    "backbone_of",
    "find_targets",
    "is_backbone",
    "lora_layers",
    "match_names",
    "matches",
    "numbered",
    "output_heads",
    "select_targets",
    "site_path",
    "walk",
]
