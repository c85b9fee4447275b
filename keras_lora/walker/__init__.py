"""A model's layers as a tree, from one walk, and the layers that `targets` selects."""

from keras_lora.walker.attention import attention_projections
from keras_lora.walker.blocks import Blocks, select_blocks
from keras_lora.walker.candidates import Target, all_targets, check_target
from keras_lora.walker.heads import backbone_of, is_backbone, output_heads
from keras_lora.walker.names import match_names, matches
from keras_lora.walker.targets import find_targets, select_targets, warn_of_heads
from keras_lora.walker.token_embeddings import token_targets
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
    "Blocks",
    "Layer",
    "Node",
    "Target",
    "Tree",
    "all_layers",
    "all_targets",
    "attention_projections",
    "backbone_of",
    "check_target",
    "find_targets",
    "is_backbone",
    "lora_layers",
    "match_names",
    "matches",
    "numbered",
    "output_heads",
    "select_blocks",
    "select_targets",
    "site_path",
    "token_targets",
    "walk",
    "warn_of_heads",
]
