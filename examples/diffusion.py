"""A small latent diffusion model of images of 28 by 28 pixels, and a distance between images.

The model has an autoencoder to 8 by 8 by 4 latents and a denoiser of latents with two resolutions
(https://arxiv.org/abs/2112.10752). With `t` in [0, 1], `a = cos(pi t / 2)` and `s = sin(pi t / 2)`,
the denoiser reads `a x + s n` and predicts `v = a n - s x`, for latents `x` and noise `n`
(https://arxiv.org/abs/2202.00512).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import keras
import numpy as np
from keras import layers, ops
from training import Features

SIDE, CHANNELS = 8, 4
WIDTH = 48
FREQUENCIES = 16
AT_ONCE = 100


def encoder() -> keras.Model:
    image = keras.Input((28, 28, 1))
    x = layers.ZeroPadding2D(2)(image)
    for width in (16, 32):
        x = layers.Conv2D(width, 4, strides=2, padding="same", activation="swish")(x)
    return keras.Model(image, layers.Conv2D(CHANNELS, 3, padding="same")(x))


def decoder() -> keras.Model:
    latent = keras.Input((SIDE, SIDE, CHANNELS))
    x = layers.Conv2D(32, 3, padding="same", activation="swish")(latent)
    for width in (32, 16):
        x = layers.Conv2DTranspose(width, 4, strides=2, padding="same", activation="swish")(x)
    image = layers.Conv2D(1, 3, padding="same", activation="sigmoid")(x)
    return keras.Model(latent, layers.Cropping2D(2)(image))


def _block(x: keras.KerasTensor, time: keras.KerasTensor, width: int) -> keras.KerasTensor:
    h = layers.Activation("swish")(layers.GroupNormalization(8)(x))
    h = layers.Conv2D(width, 3, padding="same")(h)
    h = h + layers.Reshape((1, 1, width))(layers.Dense(width)(time))
    h = layers.Activation("swish")(layers.GroupNormalization(8)(h))
    h = layers.Conv2D(width, 3, padding="same")(h)
    return h + layers.Conv2D(width, 1)(x)


def denoiser() -> keras.Model:
    latent, time = (
        keras.Input((SIDE, SIDE, CHANNELS), name="latent"),
        keras.Input((1,), name="time"),
    )
    angles = time * np.geomspace(1, 100, FREQUENCIES, dtype="float32")
    waves = layers.Concatenate()([ops.sin(angles), ops.cos(angles)])
    t = layers.Dense(2 * WIDTH, activation="swish")(waves)
    fine = _block(layers.Conv2D(WIDTH, 3, padding="same")(latent), t, WIDTH)
    coarse = layers.Conv2D(2 * WIDTH, 3, strides=2, padding="same")(fine)
    coarse = _block(coarse, t, 2 * WIDTH)
    up = layers.Conv2D(WIDTH, 3, padding="same")(layers.UpSampling2D()(coarse))
    fine = _block(layers.Concatenate()([fine, up]), t, WIDTH)
    fine = layers.Activation("swish")(layers.GroupNormalization(8)(fine))
    v = layers.Conv2D(CHANNELS, 3, padding="same", name="out")(fine)
    return keras.Model({"latent": latent, "time": time}, v)


def judge(classes: int) -> keras.Model:
    """A classifier of images, whose layer `features` the distance is about."""
    image = keras.Input((28, 28, 1))
    x = image
    for width in (16, 32, 64):
        x = layers.Conv2D(width, 3, strides=2, padding="same", activation="relu")(x)
    x = layers.Dense(32, activation="relu", name="features")(layers.Flatten()(x))
    return keras.Model(image, layers.Dense(classes)(x))


@dataclass(frozen=True)
class Autoencoder:
    """Images to latents of deviation 1 and back."""

    encoder: keras.Model
    decoder: keras.Model
    scale: float

    def latents(self, images: np.ndarray) -> np.ndarray:
        return self.encoder.predict(images, batch_size=AT_ONCE, verbose=0) / self.scale

    def images(self, latents: np.ndarray) -> np.ndarray:
        return self.decoder.predict(latents * self.scale, batch_size=AT_ONCE, verbose=0)


def noised(latents: np.ndarray, rows: int, seed: int) -> tuple[Features, np.ndarray]:
    """Rows for the denoiser: noised latents with their times, and `v`."""
    rng = np.random.default_rng(seed)
    x = latents[rng.integers(len(latents), size=rows)]
    time = rng.random((rows, 1), "float32")
    noise = rng.standard_normal(x.shape, "float32")
    a, s = (f(np.pi / 2 * time)[..., None, None] for f in (np.cos, np.sin))
    return {"latent": a * x + s * noise, "time": time}, a * noise - s * x


def sample(model: keras.Model, count: int, steps: int, seed: int) -> np.ndarray:
    """Latents that a denoiser makes of noise, without noise in between (DDIM)."""
    x = np.random.default_rng(seed).standard_normal((count, SIDE, SIDE, CHANNELS), "float32")
    times = np.linspace(1, 0, steps + 1, dtype="float32")
    for now, then in itertools.pairwise(times):
        rows = {"latent": x, "time": np.full((count, 1), now)}
        v = model.predict(rows, batch_size=min(count, AT_ONCE), verbose=0)
        a, s = np.cos(np.pi / 2 * now), np.sin(np.pi / 2 * now)
        clean, noise = a * x - s * v, s * x + a * v
        x = np.cos(np.pi / 2 * then) * clean + np.sin(np.pi / 2 * then) * noise
    return x


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """`|m - n|^2 + tr(C + D - 2 (C D)^(1/2))`, of rows with means m, n and covariances C, D.

    Reference: https://arxiv.org/abs/1706.08500, section 3.
    """
    gap = first.mean(0) - second.mean(0)
    c, d = (np.cov(rows, rowvar=False, dtype="float64") for rows in (first, second))
    values, vectors = np.linalg.eigh(c)
    root = vectors * np.sqrt(np.maximum(values, 0)) @ vectors.T
    # C^(1/2) D C^(1/2) has the eigenvalues of C D, and is symmetric.
    products = np.linalg.eigvalsh(root @ d @ root)
    return float(gap @ gap + np.trace(c + d) - 2 * np.sqrt(np.maximum(products, 0)).sum())
