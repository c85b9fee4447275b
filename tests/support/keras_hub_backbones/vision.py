"""Tiny backbones of images, video, speech and vectors."""

from __future__ import annotations

import keras
import keras_hub
import numpy as np
from keras_hub import models
from keras_hub.src.models.rqvae.rqvae_backbone import RQVAEBackbone

from support.keras_hub_backbones import sizes
from support.keras_hub_backbones.inputs import (
    BATCH,
    Factory,
    Inputs,
    floats,
    ids,
    images,
    mask,
)


def d_fine_images() -> keras.Model:
    return models.HGNetV2Backbone(
        stem_channels=[3, 8, 8],
        stackwise_stage_filters=[[8, 8, 16, 1, 1, 3], [16, 8, 24, 1, 1, 3]],
        apply_downsample=[False, True],
        use_lightweight_conv_block=[False, False],
        depths=[1, 1],
        hidden_sizes=[16, 24],
        embedding_size=8,
        use_learnable_affine_block=True,
        hidden_act="relu",
        image_shape=(32, 32, 3),
        out_features=["stage1", "stage2"],
    )


def d_fine() -> tuple[keras.Model, Inputs]:
    image_encoder = d_fine_images()
    model = models.DFineBackbone(
        backbone=image_encoder,
        decoder_in_channels=[16, 16],
        encoder_hidden_dim=16,
        num_labels=4,
        num_denoising=0,
        learn_initial_query=False,
        num_queries=5,
        anchor_image_size=(32, 32),
        feat_strides=[4, 8],
        num_feature_levels=2,
        hidden_dim=16,
        encoder_in_channels=[16, 24],
        encode_proj_layers=[1],
        num_attention_heads=2,
        encoder_ffn_dim=20,
        num_encoder_layers=1,
        hidden_expansion=0.5,
        depth_multiplier=0.34,
        eval_idx=-1,
        num_decoder_layers=2,
        decoder_attention_heads=2,
        decoder_ffn_dim=28,
        decoder_n_points=[2, 2],
        lqe_hidden_dim=12,
        num_lqe_layers=2,
        out_features=["stage1", "stage2"],
        image_shape=(32, 32, 3),
        seed=0,
    )
    return model, images(32)


def depth_anything() -> tuple[keras.Model, Inputs]:
    image_encoder = models.DINOV2Backbone(
        patch_size=7,
        num_layers=2,
        hidden_dim=16,
        num_heads=2,
        intermediate_dim=28,
        image_shape=(28, 28, 3),
        position_embedding_shape=(28, 28, 3),
        apply_layernorm=True,
        name="image_encoder",
    )
    model = models.DepthAnythingBackbone(
        image_encoder=image_encoder,
        reassemble_factors=[2, 1],
        neck_hidden_dims=[8, 12],
        fusion_hidden_dim=10,
        head_hidden_dim=6,
        head_in_index=-1,
        feature_keys=["stage1", "stage2"],
    )
    return model, images(28)


def mit() -> keras.Model:
    return models.MiTBackbone(
        layerwise_depths=[1, 1],
        num_layers=2,
        hidden_dims=[8, 12],
        layerwise_num_heads=[1, 2],
        layerwise_sr_ratios=[2, 1],
        max_drop_path_rate=0.1,
        layerwise_patch_sizes=[7, 3],
        layerwise_strides=[4, 2],
        image_shape=(32, 32, 3),
    )


def sam() -> tuple[keras.Model, Inputs]:
    image_encoder = models.ViTDetBackbone(
        image_shape=(16, 16, 3),
        patch_size=4,
        hidden_size=12,
        num_layers=2,
        intermediate_dim=20,
        num_heads=2,
        global_attention_layer_indices=[1],
        num_output_channels=8,
        window_size=2,
    )
    prompt_encoder = keras_hub.layers.SAMPromptEncoder(
        hidden_size=8,
        image_embedding_size=(4, 4),
        input_image_size=(16, 16),
        mask_in_channels=16,
    )
    mask_decoder = keras_hub.layers.SAMMaskDecoder(
        num_layers=2,
        hidden_size=8,
        intermediate_dim=28,
        num_heads=2,
        embedding_dim=8,
        num_multimask_outputs=3,
        iou_head_depth=3,
        iou_head_hidden_dim=10,
    )
    model = models.SAMBackbone(
        image_encoder=image_encoder, prompt_encoder=prompt_encoder, mask_decoder=mask_decoder
    )
    return model, {
        "images": images(16),
        "points": floats(1, 2) * 16,
        "labels": np.ones((BATCH, 1), dtype="float32"),
        "boxes": np.tile(np.array([[[2.0, 3.0], [11.0, 13.0]]], dtype="float32"), (BATCH, 1, 1, 1)),
        "masks": np.zeros((BATCH, 0, 16, 16, 1), dtype="float32"),
    }


def moonshine() -> tuple[keras.Model, Inputs]:
    model = models.MoonshineBackbone(
        vocabulary_size=sizes.VOCAB,
        filter_dim=16,
        encoder_num_layers=2,
        decoder_num_layers=2,
        hidden_dim=16,
        intermediate_dim=28,
        encoder_num_heads=2,
        decoder_num_heads=2,
        max_position_embeddings=16,
    )
    return model, {
        "encoder_input_values": floats(2048, 1),
        "encoder_padding_mask": np.ones((BATCH, 2048), dtype="bool"),
        "decoder_token_ids": ids(),
        "decoder_padding_mask": mask(sizes.LENGTH, "bool"),
    }


VISION: dict[str, Factory] = {
    "DeiTBackbone": lambda: (
        models.DeiTBackbone(
            image_shape=(16, 16, 3),
            patch_size=8,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
        ),
        images(16),
    ),
    "DepthAnythingBackbone": depth_anything,
    "DFineBackbone": d_fine,
    "DINOV2Backbone": lambda: (
        models.DINOV2Backbone(
            patch_size=8,
            num_layers=2,
            hidden_dim=12,
            num_heads=3,
            intermediate_dim=21,
            num_register_tokens=2,
            use_swiglu_ffn=True,
            image_shape=(16, 16, 3),
            position_embedding_shape=(24, 24, 3),
        ),
        images(16),
    ),
    "DINOV3Backbone": lambda: (
        models.DINOV3Backbone(
            patch_size=8,
            num_layers=2,
            hidden_dim=24,
            num_heads=3,
            intermediate_dim=28,
            num_register_tokens=2,
            use_gated_mlp=True,
            image_shape=(16, 16, 3),
        ),
        images(16),
    ),
    "MiTBackbone": lambda: (mit(), images(32)),
    "SAMBackbone": sam,
    "SegFormerBackbone": lambda: (
        models.SegFormerBackbone(image_encoder=mit(), projection_filters=10),
        images(32),
    ),
    "SwinTransformerBackbone": lambda: (
        models.SwinTransformerBackbone(
            image_shape=(32, 32, 3),
            embed_dim=12,
            depths=(2, 2),
            num_heads=(2, 3),
            window_size=4,
            mlp_ratio=1.5,
        ),
        images(32),
    ),
    "ViTBackbone": lambda: (
        models.ViTBackbone(
            image_shape=(16, 16, 3),
            patch_size=(8, 8),
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            mlp_dim=20,
        ),
        images(16),
    ),
    "ViTDetBackbone": lambda: (
        models.ViTDetBackbone(
            image_shape=(16, 16, 3),
            patch_size=4,
            hidden_size=12,
            num_layers=2,
            intermediate_dim=20,
            num_heads=3,
            global_attention_layer_indices=[1],
            num_output_channels=8,
            window_size=2,
        ),
        images(16),
    ),
}


SPEECH: dict[str, Factory] = {
    "MoonshineBackbone": moonshine,
    "WhisperBackbone": lambda: (
        models.WhisperBackbone(
            vocabulary_size=sizes.VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            num_mels=10,
            max_encoder_sequence_length=8,
            max_decoder_sequence_length=sizes.LENGTH,
        ),
        {
            "encoder_features": floats(8, 10),
            "decoder_token_ids": ids(),
            "decoder_padding_mask": mask(),
        },
    ),
}


VECTORS: dict[str, Factory] = {
    "RQVAEBackbone": lambda: (
        RQVAEBackbone(
            input_dim=16,
            encoder_layer_dims=[14, 12],
            output_dim=8,
            decoder_layer_dims=[12, 20],
            num_embeddings=5,
            num_quantizers=2,
        ),
        floats(16),
    ),
}
