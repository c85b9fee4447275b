"""Tiny backbones of images that have no dense layer: convolutions alone.

BASNet is left out: whatever its sizes, its decoder has convolutions of 512 channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
from keras_hub import models

from support.keras_hub_backbones.inputs import Factory, Inputs, images

SIDE = 32
SHAPE = (SIDE, SIDE, 3)


def resnet() -> keras.Model:
    return models.ResNetBackbone(
        input_conv_filters=[5],
        input_conv_kernel_sizes=[3],
        stackwise_num_filters=[64, 6],  # the first one cannot be another
        stackwise_num_blocks=[1, 1],
        stackwise_num_strides=[1, 2],
        block_type="bottleneck_block",
        image_shape=SHAPE,
    )


def deeplab() -> keras.Model:
    return models.DeepLabV3Backbone(
        image_encoder=resnet(),
        projection_filters=5,
        low_level_feature_key="P2",
        spatial_pyramid_pooling_key="P3",
        upsampling_size=2,
        dilation_rates=[2, 3],
        image_shape=SHAPE,
    )


def efficientnet() -> keras.Model:
    return models.EfficientNetBackbone(
        stackwise_width_coefficients=[1.0, 1.0],
        stackwise_depth_coefficients=[1.0, 1.0],
        stackwise_kernel_sizes=[3, 5],
        stackwise_num_repeats=[1, 1],
        stackwise_input_filters=[8, 8],
        stackwise_output_filters=[8, 16],
        stackwise_expansion_ratios=[2, 2],
        stackwise_squeeze_and_excite_ratios=[0.25, 0.25],
        stackwise_strides=[1, 2],
        stackwise_block_types=["fused", "unfused"],
        num_features=24,
        input_shape=SHAPE,
    )


def mobilenet() -> keras.Model:
    return models.MobileNetBackbone(
        stackwise_expansion=[[8], [12]],
        stackwise_num_blocks=[1, 1],
        stackwise_num_filters=[[8], [8]],
        stackwise_kernel_size=[[3], [5]],
        stackwise_num_strides=[[2], [1]],
        stackwise_se_ratio=[[None], [0.25]],
        stackwise_activation=[["relu"], ["hard_swish"]],
        stackwise_padding=[[1], [2]],
        output_num_filters=16,
        depthwise_filters=8,
        depthwise_stride=2,
        depthwise_residual=False,
        last_layer_filter=24,
        squeeze_and_excite=0.5,
        input_num_filters=8,
        image_shape=SHAPE,
    )


def mobilenet_v5() -> keras.Model:
    def each(first: Any, second: Any) -> list[list[Any]]:
        return [[first], [second]]

    return models.MobileNetV5Backbone(
        stackwise_block_types=each("er", "uir"),
        stackwise_num_blocks=[1, 1],
        stackwise_num_filters=each(8, 16),
        stackwise_strides=each(2, 2),
        stackwise_act_layers=each("relu", "relu"),
        stackwise_exp_ratios=each(2.0, 2.0),
        stackwise_se_ratios=each(0.0, 0.0),
        stackwise_dw_kernel_sizes=each(0, 5),
        stackwise_dw_start_kernel_sizes=each(0, 0),
        stackwise_dw_end_kernel_sizes=each(0, 0),
        stackwise_exp_kernel_sizes=each(3, 0),
        stackwise_pw_kernel_sizes=each(1, 0),
        stackwise_num_heads=each(0, 0),
        stackwise_key_dims=each(0, 0),
        stackwise_value_dims=each(0, 0),
        stackwise_kv_strides=each(0, 0),
        stackwise_use_cpe=each(False, False),
        use_msfa=False,
        stem_size=8,
        image_shape=SHAPE,
    )


def hgnet() -> keras.Model:
    return models.HGNetV2Backbone(
        stem_channels=[3, 8, 8],
        stackwise_stage_filters=[[8, 8, 16, 1, 1, 3], [16, 8, 24, 1, 1, 5]],
        apply_downsample=[False, True],
        use_lightweight_conv_block=[False, True],
        depths=[1, 1],
        hidden_sizes=[16, 24],
        embedding_size=8,
        use_learnable_affine_block=True,
        hidden_act="relu",
        image_shape=SHAPE,
    )


def cspnet() -> keras.Model:
    return models.CSPNetBackbone(
        stem_filters=8,
        stem_kernel_size=3,
        stem_strides=1,
        stackwise_depth=[1, 1],
        stackwise_strides=[2, 2],
        stackwise_num_filters=[8, 12],
        block_type="dark_block",
        stage_type="dark",
        image_shape=SHAPE,
    )


def densenet() -> keras.Model:
    return models.DenseNetBackbone(stackwise_num_repeats=[1, 1], growth_rate=6, image_shape=SHAPE)


def retinanet() -> keras.Model:
    return models.RetinaNetBackbone(
        image_encoder=resnet(), min_level=2, max_level=4, use_p5=False, image_shape=SHAPE
    )


def vgg() -> keras.Model:
    return models.VGGBackbone(
        stackwise_num_repeats=[1, 1], stackwise_num_filters=[5, 7], image_shape=SHAPE
    )


def xception() -> keras.Model:
    return models.XceptionBackbone(
        stackwise_conv_filters=[[4, 6], [6, 8]], stackwise_pooling=[True, False], image_shape=SHAPE
    )


def _on_images(make: Callable[[], keras.Model]) -> Factory:
    def factory() -> tuple[keras.Model, Inputs]:
        return make(), images(SIDE)

    return factory


CONVOLUTIONAL: dict[str, Factory] = {
    "CSPNetBackbone": _on_images(cspnet),
    "DeepLabV3Backbone": _on_images(deeplab),
    "DenseNetBackbone": _on_images(densenet),
    "EfficientNetBackbone": _on_images(efficientnet),
    "HGNetV2Backbone": _on_images(hgnet),
    "MobileNetBackbone": _on_images(mobilenet),
    "MobileNetV5Backbone": _on_images(mobilenet_v5),
    "ResNetBackbone": _on_images(resnet),
    "RetinaNetBackbone": _on_images(retinanet),
    "VGGBackbone": _on_images(vgg),
    "XceptionBackbone": _on_images(xception),
}
