"""Tiny encoder-decoders of text."""

from __future__ import annotations

from keras_hub import models

from support.keras_hub_backbones import sizes
from support.keras_hub_backbones.inputs import (
    Factory,
    encoder_decoder,
)

ENCODER_DECODERS: dict[str, Factory] = {
    "BartBackbone": lambda: (
        models.BartBackbone(
            vocabulary_size=sizes.VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=sizes.LENGTH,
        ),
        encoder_decoder(),
    ),
    "EdRecBackbone": lambda: (
        models.EdRecBackbone(
            vocab_size=sizes.VOCAB,
            num_layers_enc=2,
            num_layers_dec=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
        ),
        encoder_decoder("bool"),
    ),
    "T5Backbone": lambda: (
        models.T5Backbone(
            vocabulary_size=sizes.VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            key_value_dim=5,
        ),
        encoder_decoder(),
    ),
    "T5GemmaBackbone": lambda: (
        models.T5GemmaBackbone(
            vocabulary_size=sizes.VOCAB,
            encoder_hidden_dim=12,
            encoder_intermediate_dim=20,
            encoder_num_layers=2,
            encoder_num_attention_heads=4,
            encoder_num_key_value_heads=2,
            encoder_head_dim=6,
            encoder_layer_types=["sliding_attention", "full_attention"],
            decoder_hidden_dim=16,
            decoder_intermediate_dim=28,
            decoder_num_layers=2,
            decoder_num_attention_heads=4,
            decoder_num_key_value_heads=2,
            decoder_head_dim=6,
            decoder_layer_types=["sliding_attention", "full_attention"],
            sliding_window=4,
            cross_attention_hidden_size=12,
            attn_logit_softcapping=50.0,
        ),
        encoder_decoder(),
    ),
    "T5Gemma2Backbone": lambda: (
        models.T5Gemma2Backbone(
            vocabulary_size=sizes.VOCAB,
            encoder_hidden_dim=16,
            encoder_intermediate_dim=20,
            encoder_num_layers=2,
            encoder_num_attention_heads=4,
            encoder_num_key_value_heads=2,
            encoder_head_dim=6,
            encoder_layer_types=["sliding_attention", "full_attention"],
            decoder_hidden_dim=16,
            decoder_intermediate_dim=28,
            decoder_num_layers=2,
            decoder_num_attention_heads=4,
            decoder_num_key_value_heads=2,
            decoder_head_dim=6,
            decoder_layer_types=["sliding_attention", "full_attention"],
            sliding_window=4,
            cross_attention_hidden_size=16,
            attn_logit_softcapping=50.0,
        ),
        encoder_decoder(),
    ),
}
