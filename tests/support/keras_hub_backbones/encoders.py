"""Tiny encoders of text."""

from __future__ import annotations

from keras_hub import models

from support.keras_hub_backbones import sizes
from support.keras_hub_backbones.inputs import (
    Factory,
    ids,
    segmented,
    segments,
    tokens,
)

ENCODERS: dict[str, Factory] = {
    "AlbertBackbone": lambda: (
        models.AlbertBackbone(
            vocabulary_size=sizes.VOCAB,
            num_layers=2,
            num_heads=3,
            embedding_dim=8,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=sizes.LENGTH,
        ),
        segmented(),
    ),
    "BertBackbone": lambda: (
        models.BertBackbone(
            vocabulary_size=sizes.VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=sizes.LENGTH,
        ),
        segmented(),
    ),
    "DebertaV3Backbone": lambda: (
        models.DebertaV3Backbone(
            vocabulary_size=sizes.VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=sizes.LENGTH,
            bucket_size=4,
        ),
        tokens(),
    ),
    "DistilBertBackbone": lambda: (
        models.DistilBertBackbone(
            vocabulary_size=sizes.VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=sizes.LENGTH,
        ),
        tokens(),
    ),
    "ElectraBackbone": lambda: (
        models.ElectraBackbone(
            vocab_size=sizes.VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            embedding_dim=8,
            intermediate_dim=20,
            max_sequence_length=sizes.LENGTH,
        ),
        segmented(),
    ),
    "ESMBackbone": lambda: (
        models.ESMBackbone(
            vocabulary_size=sizes.VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=sizes.LENGTH,
        ),
        {"token_ids": ids()},
    ),
    "FNetBackbone": lambda: (
        models.FNetBackbone(
            vocabulary_size=sizes.VOCAB,
            num_layers=2,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=sizes.LENGTH,
        ),
        {"token_ids": ids(), "segment_ids": segments()},
    ),
    "RobertaBackbone": lambda: (
        models.RobertaBackbone(
            vocabulary_size=sizes.VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=sizes.LENGTH,
        ),
        tokens(),
    ),
    "RoformerV2Backbone": lambda: (
        models.RoformerV2Backbone(
            vocabulary_size=sizes.VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            head_size=4,
        ),
        {"token_ids": ids(), "segment_ids": segments()},
    ),
    "XLMRobertaBackbone": lambda: (
        models.XLMRobertaBackbone(
            vocabulary_size=sizes.VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=sizes.LENGTH,
        ),
        tokens(),
    ),
    "XLNetBackbone": lambda: (
        models.XLNetBackbone(
            vocabulary_size=sizes.VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
        ),
        segmented(),
    ),
}
