"""Small configurations of the KerasHub backbones that hold Dense or EinsumDense layers.

`BACKBONES` maps the name of a backbone class to a factory that takes no arguments and returns
`(model, inputs)`: a randomly initialised float32 model of about two layers, and deterministic
numpy inputs for a batch of two that `model(inputs)` accepts. Every model holds at least one
`keras.layers.Dense` or `keras.layers.EinsumDense` somewhere inside. Purely convolutional
backbones (ResNet, EfficientNet, MobileNet, ...) are left out: they have no such layer.

Sizes are tiny, and differ from each other wherever the architecture lets them, so that a mix-up
of axes shows up as an error of shape. Nothing here knows about LoRA.
"""

from collections.abc import Callable
from typing import Any

import keras
import keras_hub
import numpy as np
from keras_hub import models
from keras_hub.src.models.rqvae.rqvae_backbone import RQVAEBackbone
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

Array = np.ndarray[Any, np.dtype[Any]]
Inputs = Array | dict[str, Array]
Factory = Callable[[], tuple[keras.Model, Inputs]]

BATCH = 2
VOCAB = 19
LENGTH = 7


# --- Inputs ---------------------------------------------------------------------------------


def _floats(*shape: int) -> Array:
    return np.random.default_rng(0).uniform(size=(BATCH, *shape)).astype("float32")


def _mask(length: int = LENGTH, dtype: str = "int32") -> Array:
    """Ones, but for two padded positions at the end of the second row."""
    mask = np.ones((BATCH, length), dtype=dtype)
    mask[1, -2:] = 0
    return mask


def _ids(length: int = LENGTH, seed: int = 0) -> Array:
    """Token ids from 1 to VOCAB - 1, and 0 where `_mask` says padding."""
    ids = np.random.default_rng(seed).integers(1, VOCAB, size=(BATCH, length))
    return (ids * _mask(length)).astype("int32")


def _tokens(length: int = LENGTH) -> dict[str, Array]:
    return {"token_ids": _ids(length), "padding_mask": _mask(length)}


def _segments(length: int = LENGTH) -> Array:
    segments = np.zeros((BATCH, length), dtype="int32")
    segments[:, length // 2 :] = 1
    return segments


def _segmented() -> dict[str, Array]:
    return {**_tokens(), "segment_ids": _segments()}


def _encoder_decoder(mask_dtype: str = "int32") -> dict[str, Array]:
    return {
        "encoder_token_ids": _ids(LENGTH),
        "encoder_padding_mask": _mask(LENGTH, mask_dtype),
        "decoder_token_ids": _ids(LENGTH - 2, seed=1),
        "decoder_padding_mask": _mask(LENGTH - 2, mask_dtype),
    }


def _images(size: int) -> Array:
    return _floats(size, size, 3)


def _rows(values: list[int], dtype: str = "int32") -> Array:
    """The same row for each element of the batch."""
    return np.tile(np.array(values, dtype=dtype), (BATCH, 1))


# --- Backbones made of several parts ----------------------------------------------------------


def _blip2() -> tuple[keras.Model, Inputs]:
    vision_encoder = models.BLIP2VisionEncoder(
        image_size=16,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=12,
        intermediate_dim=20,
        use_patch_bias=True,
        use_class_token=True,
        use_mha_bias=True,
        use_mlp_bias=True,
        dropout_rate=0.0,
        layer_norm_epsilon=1e-6,
        initializer_range=0.02,
    )
    qformer = models.BLIP2QFormer(
        num_query_tokens=3,
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        intermediate_dim=28,
        vision_dim=12,
        cross_attention_frequency=2,
        dropout=0.0,
        layer_norm_epsilon=1e-6,
    )
    language_model = models.BLIP2CustomOPT(
        vocabulary_size=VOCAB,
        num_layers=2,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=24,
        num_query_tokens=3,
        qformer_hidden_dim=16,
        max_sequence_length=12,
        dropout=0.0,
        language_projection=None,
    )
    model = models.BLIP2Backbone(
        vision_encoder=vision_encoder, qformer=qformer, language_model=language_model
    )
    return model, {"images": _images(16), **_tokens()}


def _clip() -> tuple[keras.Model, Inputs]:
    vision_encoder = models.CLIPVisionEncoder(
        patch_size=8,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        intermediate_dim=28,
        image_shape=(16, 16, 3),
        name="vision_encoder",
    )
    text_encoder = models.CLIPTextEncoder(
        vocabulary_size=VOCAB,
        embedding_dim=12,
        hidden_dim=12,
        num_layers=2,
        num_heads=3,
        intermediate_dim=20,
        max_sequence_length=LENGTH,
        name="text_encoder",
    )
    model = models.CLIPBackbone(
        vision_encoder=vision_encoder, text_encoder=text_encoder, projection_dim=10
    )
    return model, {"images": _images(16), "token_ids": _ids()}


def _d_fine() -> tuple[keras.Model, Inputs]:
    image_encoder = models.HGNetV2Backbone(
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
    return model, _images(32)


def _depth_anything() -> tuple[keras.Model, Inputs]:
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
    return model, _images(28)


def _flux() -> tuple[keras.Model, Inputs]:
    model = models.FluxBackbone(
        input_channels=8,
        hidden_size=32,
        mlp_ratio=1.5,
        num_heads=2,
        depth=1,
        depth_single_blocks=2,
        axes_dim=[4, 6, 6],
        theta=10_000,
        use_bias=True,
        guidance_embed=True,
        image_shape=(4, 8),
        text_shape=(5, 12),
        image_ids_shape=(4, 3),
        text_ids_shape=(5, 3),
        y_shape=(6,),
    )
    return model, {
        "image": _floats(4, 8),
        "image_ids": _floats(4, 3),
        "text": _floats(5, 12),
        "text_ids": _floats(5, 3),
        "y": _floats(6),
        "timesteps": _floats(),
        "guidance": _floats(),
    }


def _gemma3() -> tuple[keras.Model, Inputs]:
    vision_encoder = models.Gemma3VisionEncoder(
        image_size=16,
        patch_size=4,
        pool_size=2,
        num_layers=2,
        num_heads=2,
        hidden_dim=12,
        intermediate_dim=20,
        output_dim=16,
    )
    model = models.Gemma3Backbone(
        vocabulary_size=VOCAB,
        image_size=16,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=28,
        head_dim=6,
        use_post_ffw_norm=True,
        use_post_attention_norm=True,
        use_sliding_window_attention=True,
        sliding_window_size=5,
        vision_encoder=vision_encoder,
    )
    return model, {
        **_tokens(10),
        "images": _floats(1, 16, 16, 3),
        "vision_mask": _rows([0, 0, 1, 1, 1, 1, 0, 0, 0, 0]),
        "vision_indices": _rows([2, 3, 4, 5]),
    }


def _gemma3n() -> tuple[keras.Model, Inputs]:
    vision_encoder = models.MobileNetV5Backbone(
        stackwise_block_types=[["er"]],
        stackwise_num_blocks=[1],
        stackwise_num_filters=[[8]],
        stackwise_strides=[[1]],
        stackwise_act_layers=[["relu"]],
        stackwise_exp_ratios=[[1.0]],
        stackwise_se_ratios=[[0.0]],
        stackwise_dw_kernel_sizes=[[0]],
        stackwise_dw_start_kernel_sizes=[[0]],
        stackwise_dw_end_kernel_sizes=[[0]],
        stackwise_exp_kernel_sizes=[[3]],
        stackwise_pw_kernel_sizes=[[1]],
        stackwise_num_heads=[[0]],
        stackwise_key_dims=[[0]],
        stackwise_value_dims=[[0]],
        stackwise_kv_strides=[[0]],
        stackwise_use_cpe=[[False]],
        num_features=4,
        image_shape=(8, 8, 3),
        use_msfa=False,
    )
    image_token, audio_token = VOCAB - 2, VOCAB - 1
    audio_encoder_config = {
        "hidden_size": 8,
        "input_feat_size": 12,
        "sscp_conv_channel_size": [2, 4],
        "sscp_conv_kernel_size": [(1, 1), (1, 1)],
        "sscp_conv_stride_size": [(2, 2), (2, 2)],
        "sscp_conv_group_norm_eps": 1e-5,
        "num_hidden_layers": 1,
        "rms_norm_eps": 1e-6,
        "gradient_clipping": 1.0,
        "residual_weight": 0.5,
        "num_attention_heads": 2,
        "attention_chunk_size": 2,
        "num_attention_context_right": 1,
        "num_attention_context_left": 1,
        "attention_logit_cap": 50.0,
        "conv_kernel_size": 3,
        "reduction_factor": 1,
    }
    model = models.Gemma3nBackbone(
        text_vocab_size=VOCAB,
        text_hidden_size=16,
        num_hidden_layers=2,
        pad_token_id=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        intermediate_size=[28, 28],
        hidden_activation="gelu_approximate",
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=4,
        rope_theta=10_000.0,
        max_position_embeddings=16,
        vocab_size_per_layer_input=VOCAB,
        hidden_size_per_layer_input=5,
        altup_num_inputs=2,
        laurel_rank=3,
        vision_encoder_config=vision_encoder.get_config(),
        vision_hidden_size=8,
        image_token_id=image_token,
        audio_encoder_config=audio_encoder_config,
        audio_hidden_size=8,
        audio_token_id=audio_token,
    )
    token_ids = _ids()
    token_ids[:, 1:3] = image_token
    token_ids[:, 3:5] = audio_token
    return model, {
        "token_ids": token_ids,
        "padding_mask": _mask(LENGTH, "bool"),
        "images": _floats(1, 8, 8, 3),
        "input_features": _floats(1, 8, 12),
        "input_features_mask": np.zeros((BATCH, 1, 8), dtype="bool"),
    }


def _gemma4() -> tuple[keras.Model, Inputs]:
    vision_encoder = models.Gemma4VisionEncoder(
        image_size=16,
        patch_size=4,
        pool_size=2,
        num_layers=1,
        num_heads=3,
        head_dim=4,
        num_key_value_heads=3,
        hidden_dim=12,
        intermediate_dim=20,
        output_dim=16,
    )
    audio_encoder = models.Gemma4AudioEncoder(
        input_feat_size=12,
        hidden_size=8,
        num_heads=2,
        num_layers=1,
        chunk_size=4,
        context_left=5,
        context_right=0,
        sscp_conv_channels=(4, 2),
        sscp_kernel_sizes=((3, 3), (3, 3)),
        sscp_stride_sizes=((2, 2), (2, 2)),
        output_proj_dims=10,
        output_dim=16,
    )
    model = models.Gemma4Backbone(
        vocabulary_size=VOCAB,
        image_size=16,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=16,
        intermediate_dim=28,
        head_dim=6,
        sliding_window_size=5,
        sliding_window_pattern=2,
        vision_encoder=vision_encoder,
        audio_encoder=audio_encoder,
        num_audio_tokens_per_clip=4,
    )
    patch_positions = np.stack(np.meshgrid(np.arange(4), np.arange(4)), axis=-1).reshape(16, 2)
    return model, {
        **_tokens(14),
        "position_ids": _rows(list(range(14))),
        "pixel_values": _floats(1, 16, 48),
        "pixel_position_ids": np.tile(patch_positions, (BATCH, 1, 1, 1)).astype("int32"),
        "vision_mask": _rows([0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
        "vision_indices": _rows([2, 3, 4, 5]),
        "audio_mel": _floats(1, 16, 12),
        "audio_mel_mask": np.ones((BATCH, 1, 16), dtype="int32"),
        "audio_mask": _rows([0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0]),
        "audio_indices": _rows([7, 8, 9, 10]),
    }


def _metaclip2() -> tuple[keras.Model, Inputs]:
    vision_encoder = models.MetaCLIP2VisionEncoder(
        patch_size=8,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        intermediate_dim=28,
        image_shape=(16, 16, 3),
        name="vision_encoder",
    )
    text_encoder = models.MetaCLIP2TextEncoder(
        vocabulary_size=VOCAB,
        embedding_dim=12,
        hidden_dim=12,
        num_layers=2,
        num_heads=3,
        intermediate_dim=20,
        max_sequence_length=LENGTH,
        name="text_encoder",
    )
    model = models.MetaCLIP2Backbone(
        vision_encoder=vision_encoder, text_encoder=text_encoder, projection_dim=10
    )
    return model, {"images": _images(16), "token_ids": _ids()}


def _mit() -> keras.Model:
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


def _moonshine() -> tuple[keras.Model, Inputs]:
    model = models.MoonshineBackbone(
        vocabulary_size=VOCAB,
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
        "encoder_input_values": _floats(2048, 1),
        "encoder_padding_mask": np.ones((BATCH, 2048), dtype="bool"),
        "decoder_token_ids": _ids(),
        "decoder_padding_mask": _mask(LENGTH, "bool"),
    }


def _pali_gemma() -> tuple[keras.Model, Inputs]:
    model = models.PaliGemmaBackbone(
        vocabulary_size=VOCAB,
        image_size=16,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=1,
        hidden_dim=16,
        intermediate_dim=56,
        head_dim=6,
        vit_patch_size=8,
        vit_num_layers=2,
        vit_num_heads=2,
        vit_hidden_dim=12,
        vit_intermediate_dim=20,
    )
    return model, {
        **_tokens(),
        "images": _images(16),
        "response_mask": _rows([0, 0, 0, 0, 1, 1, 1]),
    }


def _parseq() -> tuple[keras.Model, Inputs]:
    image_encoder = models.ViTBackbone(
        image_shape=(16, 32, 3),
        patch_size=(4, 8),
        num_layers=2,
        num_heads=2,
        hidden_dim=16,
        mlp_dim=28,
        use_class_token=False,
        name="image_encoder",
    )
    model = models.PARSeqBackbone(
        image_encoder=image_encoder,
        vocabulary_size=VOCAB,
        max_label_length=LENGTH,
        decoder_hidden_dim=16,
        num_decoder_layers=1,
        num_decoder_heads=2,
        decoder_mlp_dim=20,
    )
    return model, {"images": _floats(16, 32, 3), **_tokens()}


def _sam() -> tuple[keras.Model, Inputs]:
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
        "images": _images(16),
        "points": _floats(1, 2) * 16,
        "labels": np.ones((BATCH, 1), dtype="float32"),
        "boxes": np.tile(np.array([[[2.0, 3.0], [11.0, 13.0]]], dtype="float32"), (BATCH, 1, 1, 1)),
        "masks": np.zeros((BATCH, 0, 16, 16, 1), dtype="float32"),
    }


def _sam3() -> tuple[keras.Model, Inputs]:
    layers = keras_hub.layers
    model = models.SAM3PromptableConceptBackbone(
        vision_encoder=layers.SAM3VisionEncoder(
            image_shape=(28, 28, 3),
            patch_size=14,
            num_layers=2,
            hidden_dim=24,
            intermediate_dim=20,
            num_heads=2,
            fpn_hidden_dim=16,
            fpn_scale_factors=[4.0, 2.0, 1.0, 0.5],
            pretrain_image_shape=(42, 42, 3),
            window_size=2,
            global_attn_indexes=[1],
        ),
        text_encoder=layers.SAM3TextEncoder(
            vocabulary_size=VOCAB,
            embedding_dim=12,
            hidden_dim=12,
            num_layers=1,
            num_heads=2,
            intermediate_dim=20,
        ),
        geometry_encoder=layers.SAM3GeometryEncoder(
            num_layers=1, hidden_dim=16, intermediate_dim=28, num_heads=2, roi_size=3
        ),
        detr_encoder=layers.SAM3DetrEncoder(
            num_layers=1, hidden_dim=16, intermediate_dim=28, num_heads=2
        ),
        detr_decoder=layers.SAM3DetrDecoder(
            image_shape=(28, 28, 3),
            patch_size=14,
            num_layers=1,
            hidden_dim=16,
            intermediate_dim=28,
            num_heads=2,
            num_queries=5,
        ),
        mask_decoder=layers.SAM3MaskDecoder(num_upsampling_stages=3, hidden_dim=16, num_heads=2),
    )
    boxes = np.tile(np.array([0.5, 0.5, 0.25, 0.5, 1.0], dtype="float32"), (BATCH, 1, 1))
    return model, {
        "pixel_values": _images(28),
        "token_ids": _ids(32),
        "padding_mask": _mask(32),
        "boxes": boxes,
        "box_labels": np.ones((BATCH, 1), dtype="int32"),
    }


def _siglip() -> tuple[keras.Model, Inputs]:
    vision_encoder = models.SigLIPVisionEncoder(
        patch_size=8,
        hidden_dim=16,
        num_layers=2,
        num_heads=2,
        intermediate_dim=28,
        image_shape=(16, 16, 3),
        name="vision_encoder",
    )
    text_encoder = models.SigLIPTextEncoder(
        vocabulary_size=VOCAB,
        embedding_dim=12,
        hidden_dim=12,
        num_layers=2,
        num_heads=3,
        intermediate_dim=20,
        max_sequence_length=LENGTH,
        projection_dim=16,
        name="text_encoder",
    )
    model = models.SigLIPBackbone(vision_encoder=vision_encoder, text_encoder=text_encoder)
    return model, {"images": _images(16), "token_ids": _ids()}


def _stable_diffusion3() -> tuple[keras.Model, Inputs]:
    vae = VAEBackbone(
        encoder_num_filters=[32, 32, 32, 32],
        encoder_num_blocks=[1, 1, 1, 1],
        decoder_num_filters=[32, 32, 32, 32],
        decoder_num_blocks=[1, 1, 1, 1],
        sampler_method="mode",
        name="vae",
    )

    def text_encoder(name: str, hidden_dim: int) -> keras.Model:
        return models.CLIPTextEncoder(
            vocabulary_size=VOCAB,
            embedding_dim=hidden_dim,
            hidden_dim=hidden_dim,
            num_layers=2,
            num_heads=2,
            intermediate_dim=hidden_dim + 4,
            intermediate_output_index=-2,
            max_sequence_length=LENGTH,
            dtype="float32",
            name=name,
        )

    model = models.StableDiffusion3Backbone(
        mmdit_patch_size=2,
        mmdit_hidden_dim=16,
        mmdit_num_layers=2,
        mmdit_num_heads=2,
        mmdit_position_size=6,
        mmdit_qk_norm="rms_norm",
        mmdit_dual_attention_indices=(0,),
        vae=vae,
        clip_l=text_encoder("clip_l", 12),
        clip_g=text_encoder("clip_g", 20),
        image_shape=(32, 32, 3),
    )
    return model, {
        "images": _images(32),
        "latents": _floats(4, 4, 16),
        "clip_l_token_ids": _ids(),
        "clip_l_negative_token_ids": _ids(seed=1),
        "clip_g_token_ids": _ids(),
        "clip_g_negative_token_ids": _ids(seed=1),
        "num_steps": np.full((BATCH,), 2, dtype="int32"),
        "guidance_scale": np.full((BATCH,), 3.5, dtype="float32"),
    }


def _video_prism() -> tuple[keras.Model, Inputs]:
    model = models.VideoPrismBackbone(
        num_frames=3,
        patch_size=8,
        hidden_dim=16,
        intermediate_dim=28,
        num_heads=2,
        num_spatial_layers=1,
        num_temporal_layers=1,
        num_auxiliary_layers=1,
        vocabulary_size=VOCAB,
        num_text_layers=1,
        attention_logit_soft_cap=50.0,
        image_shape=(16, 16, 3),
    )
    return model, {"pixel_values": _floats(3, 16, 16, 3), **_tokens()}


# --- The table --------------------------------------------------------------------------------

BACKBONES: dict[str, Factory] = {
    # Text encoders.
    "AlbertBackbone": lambda: (
        models.AlbertBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            embedding_dim=8,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=LENGTH,
        ),
        _segmented(),
    ),
    "BertBackbone": lambda: (
        models.BertBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=LENGTH,
        ),
        _segmented(),
    ),
    "DebertaV3Backbone": lambda: (
        models.DebertaV3Backbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=LENGTH,
            bucket_size=4,
        ),
        _tokens(),
    ),
    "DistilBertBackbone": lambda: (
        models.DistilBertBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=LENGTH,
        ),
        _tokens(),
    ),
    "ElectraBackbone": lambda: (
        models.ElectraBackbone(
            vocab_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            embedding_dim=8,
            intermediate_dim=20,
            max_sequence_length=LENGTH,
        ),
        _segmented(),
    ),
    "ESMBackbone": lambda: (
        models.ESMBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=LENGTH,
        ),
        {"token_ids": _ids()},
    ),
    "FNetBackbone": lambda: (
        models.FNetBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=LENGTH,
        ),
        {"token_ids": _ids(), "segment_ids": _segments()},
    ),
    "RobertaBackbone": lambda: (
        models.RobertaBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=LENGTH,
        ),
        _tokens(),
    ),
    "RoformerV2Backbone": lambda: (
        models.RoformerV2Backbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            head_size=4,
        ),
        {"token_ids": _ids(), "segment_ids": _segments()},
    ),
    "XLMRobertaBackbone": lambda: (
        models.XLMRobertaBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=LENGTH,
        ),
        _tokens(),
    ),
    "XLNetBackbone": lambda: (
        models.XLNetBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
        ),
        _segmented(),
    ),
    # Text decoders.
    "BloomBackbone": lambda: (
        models.BloomBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=4,
            hidden_dim=16,
            intermediate_dim=28,
        ),
        _tokens(),
    ),
    "FalconBackbone": lambda: (
        models.FalconBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_attention_heads=4,
            hidden_dim=16,
            intermediate_dim=28,
        ),
        _tokens(),
    ),
    "GPT2Backbone": lambda: (
        models.GPT2Backbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=LENGTH,
        ),
        _tokens(),
    ),
    "GPTNeoXBackbone": lambda: (
        models.GPTNeoXBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=24,
            intermediate_dim=28,
            max_sequence_length=LENGTH,
        ),
        _tokens(),
    ),
    "GemmaBackbone": lambda: (
        models.GemmaBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=1,
            hidden_dim=16,
            intermediate_dim=56,
            head_dim=6,
        ),
        _tokens(),
    ),
    "GptOssBackbone": lambda: (
        models.GptOssBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=16,
            intermediate_dim=28,
            num_experts=3,
            top_k=2,
            sliding_window=4,
        ),
        _tokens(),
    ),
    "LlamaBackbone": lambda: (
        models.LlamaBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=16,
            intermediate_dim=28,
        ),
        _tokens(),
    ),
    "Llama3Backbone": lambda: (
        models.Llama3Backbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=16,
            intermediate_dim=28,
        ),
        _tokens(),
    ),
    "MistralBackbone": lambda: (
        models.MistralBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=16,
            intermediate_dim=28,
            sliding_window=4,
        ),
        _tokens(),
    ),
    "MixtralBackbone": lambda: (
        models.MixtralBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=16,
            intermediate_dim=28,
            num_experts=3,
            top_k=2,
            sliding_window=4,
        ),
        _tokens(),
    ),
    "OPTBackbone": lambda: (
        models.OPTBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=LENGTH,
        ),
        _tokens(),
    ),
    "Phi3Backbone": lambda: (
        models.Phi3Backbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=16,
            intermediate_dim=28,
        ),
        _tokens(),
    ),
    "QwenBackbone": lambda: (
        models.QwenBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=16,
            intermediate_dim=28,
        ),
        _tokens(),
    ),
    "QwenMoeBackbone": lambda: (
        models.QwenMoeBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            hidden_dim=16,
            intermediate_dim=28,
            moe_intermediate_dim=10,
            shared_expert_intermediate_dim=12,
            num_experts=3,
            top_k=2,
        ),
        _tokens(),
    ),
    "Qwen3Backbone": lambda: (
        models.Qwen3Backbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            hidden_dim=16,
            intermediate_dim=28,
        ),
        _tokens(),
    ),
    "Qwen3MoeBackbone": lambda: (
        models.Qwen3MoeBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            head_dim=6,
            hidden_dim=16,
            intermediate_dim=28,
            moe_intermediate_dim=10,
            num_experts=3,
            top_k=2,
            mlp_only_layers=[0],
        ),
        _tokens(),
    ),
    "Qwen3_5Backbone": lambda: (
        models.Qwen3_5Backbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            hidden_dim=16,
            intermediate_dim=28,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=4,
            linear_value_head_dim=6,
            linear_conv_kernel_dim=3,
        ),
        _tokens(),
    ),
    "Qwen3_5MoeBackbone": lambda: (
        models.Qwen3_5MoeBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_query_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            hidden_dim=16,
            moe_intermediate_dim=10,
            shared_expert_intermediate_size=12,
            num_experts=3,
            top_k=2,
            layer_types=["linear_attention", "full_attention"],
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=4,
            linear_value_head_dim=6,
            linear_conv_kernel_dim=3,
        ),
        _tokens(),
    ),
    "RWKV7Backbone": lambda: (
        models.RWKV7Backbone(
            vocabulary_size=VOCAB,
            hidden_size=16,
            head_size=4,
            num_layers=2,
            intermediate_dim=28,
            gate_lora=10,
            mv_lora=6,
            aaa_lora=8,
            decay_lora=8,
        ),
        _tokens(16),
    ),
    "SmolLM3Backbone": lambda: (
        models.SmolLM3Backbone(
            vocabulary_size=VOCAB,
            hidden_dim=16,
            intermediate_dim=28,
            num_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attention_bias=False,
            attention_dropout=0.0,
            rope_layer_enabled_list=[True, False],
            layer_types=["attention", "attention"],
            mlp_bias=False,
            layer_norm_epsilon=1e-5,
            max_position_embeddings=16,
            rope_theta=10_000.0,
            partial_rotary_factor=1.0,
        ),
        _tokens(),
    ),
    # Text encoder-decoders.
    "BartBackbone": lambda: (
        models.BartBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            max_sequence_length=LENGTH,
        ),
        _encoder_decoder(),
    ),
    "EdRecBackbone": lambda: (
        models.EdRecBackbone(
            vocab_size=VOCAB,
            num_layers_enc=2,
            num_layers_dec=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
        ),
        _encoder_decoder("bool"),
    ),
    "T5Backbone": lambda: (
        models.T5Backbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            key_value_dim=5,
        ),
        _encoder_decoder(),
    ),
    "T5GemmaBackbone": lambda: (
        models.T5GemmaBackbone(
            vocabulary_size=VOCAB,
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
        _encoder_decoder(),
    ),
    "T5Gemma2Backbone": lambda: (
        models.T5Gemma2Backbone(
            vocabulary_size=VOCAB,
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
        _encoder_decoder(),
    ),
    # Images and video.
    "DeiTBackbone": lambda: (
        models.DeiTBackbone(
            image_shape=(16, 16, 3),
            patch_size=8,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
        ),
        _images(16),
    ),
    "DepthAnythingBackbone": _depth_anything,
    "DFineBackbone": _d_fine,
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
        _images(16),
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
        _images(16),
    ),
    "MiTBackbone": lambda: (_mit(), _images(32)),
    "SAMBackbone": _sam,
    "SegFormerBackbone": lambda: (
        models.SegFormerBackbone(image_encoder=_mit(), projection_filters=10),
        _images(32),
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
        _images(32),
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
        _images(16),
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
        _images(16),
    ),
    # Speech.
    "MoonshineBackbone": _moonshine,
    "WhisperBackbone": lambda: (
        models.WhisperBackbone(
            vocabulary_size=VOCAB,
            num_layers=2,
            num_heads=3,
            hidden_dim=12,
            intermediate_dim=20,
            num_mels=10,
            max_encoder_sequence_length=8,
            max_decoder_sequence_length=LENGTH,
        ),
        {
            "encoder_features": _floats(8, 10),
            "decoder_token_ids": _ids(),
            "decoder_padding_mask": _mask(),
        },
    ),
    # Several modalities, and image generation.
    "BLIP2Backbone": _blip2,
    "CLIPBackbone": _clip,
    "FluxBackbone": _flux,
    "Gemma3Backbone": _gemma3,
    "Gemma3nBackbone": _gemma3n,
    "Gemma4Backbone": _gemma4,
    "MetaCLIP2Backbone": _metaclip2,
    "PaliGemmaBackbone": _pali_gemma,
    "PARSeqBackbone": _parseq,
    "SAM3PromptableConceptBackbone": _sam3,
    "SigLIPBackbone": _siglip,
    "StableDiffusion3Backbone": _stable_diffusion3,
    "VideoPrismBackbone": _video_prism,
    # Vectors.
    "RQVAEBackbone": lambda: (
        RQVAEBackbone(
            input_dim=16,
            encoder_layer_dims=[14, 12],
            output_dim=8,
            decoder_layer_dims=[12, 20],
            num_embeddings=5,
            num_quantizers=2,
        ),
        _floats(16),
    ),
}
