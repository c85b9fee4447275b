"""Writes `docs/architectures.md`: what of each KerasHub architecture goes to PEFT and back.

`make architectures` runs it. Each row is tried: a tiny model gets an adapter with random values,
which is saved for PEFT, loaded again and compared bit for bit.

    PYTHONPATH=tests python docs/architectures.py [file]
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import keras_hub
import numpy as np
from support.hugging_face_models import HUGGING_FACE_MODELS, NEEDS_CONFIG
from support.keras_hub_backbones import BACKBONES
from support.models import randomize_adapters
from support.peft_models import CASES, KERAS_OPTIONS

import keras_lora as kl
from keras_lora.exchange.converters import HuggingFaceWeights, hugging_face_weights
from keras_lora.exchange.converters.converters import converter_modules
from keras_lora.exchange.peft.embeddings import refused_embeddings
from keras_lora.exchange.peft.kernels import blocks_by_module

PAGE = Path("docs/architectures.md")
HEAD = """\
# Architectures

Which architectures exchange adapters with [Hugging Face PEFT](peft.md), and what of them. Written
by `make architectures` with KerasHub {version}; not edited by hand.

- **Layers**: how many of the `Dense`, `EinsumDense` and embedding layers of a tiny backbone, most
  often one of two blocks, are a matrix in the Hugging Face model. These are imported and exported;
  an adapter with others is refused, with their paths. For each row an adapter on all of them was
  saved, loaded and found the same, bit for bit. Of a decoder whose embedding makes the logits too,
  that [embedding is not exchanged](peft.md#to-peft).
- **Modules**: their names in a checkpoint;
  [transformers 5 renames some](peft.md#names-in-transformers-5). "(3)" marks a fused matrix, which
  is that many layers in Keras. The routers of experts (`gate`, `router`) and Gemma 3's
  `mm_input_projection_weight` are no `nn.Linear` in transformers 5, and PEFT does not adapt them.
- **Experts** of mixtures are [parameters](peft.md#to-peft), exchanged too and not in this table.
- **Compared**: in the tests, on tiny random models. *outputs*: those of both models with an
  adapter, against `peft` and `transformers`, both ways. *weights*: each kernel with the weight
  that it is said to be, in a checkpoint of `transformers`. *names only*: neither; these are the
  names that KerasHub's converter asks for.

| KerasHub backbone | Hugging Face model type | layers | modules | compared |
|---|---|---|---|---|
"""
NO_CONVERTER = """
## Without a converter

KerasHub loads no Hugging Face checkpoint into these backbones. They are adapted, trained and saved
like the others, but not exchanged with PEFT: {with_layers}.

These have none either; they are convolutional, or not in the tests: {others}.
"""
# Names that say little without the one before them.
GENERAL = ("dense", "linear")
_TEXT_ALONE = {"vision_encoder": None, "audio_encoder": None}
# What the tiny backbones have, and the models of this type or in the tests do not.
CHANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(["gemma3_text", "gemma4_text", "gemma4_assistant"], _TEXT_ALONE),
    # transformers 5 has two matrices in the place of `weights_in`.
    "dinov2": {"use_swiglu_ffn": False},
    "dinov2_with_registers": {"use_swiglu_ffn": False},
    "dinov3_vit": {"use_gated_mlp": False},
    "qwen3_moe": {"mlp_only_layers": []},  # KerasHub's converter stops at others
}


@dataclass(frozen=True)
class Row:
    """A backbone class and a model type that KerasHub's converter loads into it."""

    backbone: keras.Model
    model_type: str
    compared: str

    def cells(self) -> list[str]:
        config = NEEDS_CONFIG.get(self.model_type)
        options: dict[str, Any] = {"transformers_config": config, "model_type": self.model_type}
        weights = exchanged(self.backbone, hugging_face_weights(self.backbone, **options))
        check_exchange(self.backbone, weights, options)
        return [
            f"`{type(self.backbone).__name__}`",
            f"`{self.model_type}`",
            layers_cell(weights),
            ", ".join(modules_of(weights)),
            self.compared,
        ]


def exchanged(backbone: keras.Model, weights: HuggingFaceWeights) -> HuggingFaceWeights:
    """Without the embeddings that are refused."""
    embeddings = refused_embeddings(backbone, weights)
    blocks = {path: found for path, found in weights.blocks.items() if path not in embeddings}
    return dataclasses.replace(weights, blocks=blocks, refused={**weights.refused, **embeddings})


def check_exchange(
    backbone: keras.Model, weights: HuggingFaceWeights, options: dict[str, Any]
) -> None:
    """An adapter on all layers that have a place is the same after PEFT's files."""
    placed = placed_layers(weights)
    config = kl.LoRAConfig(rank=2, targets=lambda target: target.path in placed)
    kl.apply_lora(backbone, config)
    randomize_adapters(backbone)
    with tempfile.TemporaryDirectory() as directory:
        kl.save_peft_adapter(backbone, directory, prefix="", overwrite=True, **options)
        kl.load_peft_adapter(backbone, directory, "again", **options)
    layers = kl.lora_layers(backbone)
    assert set(layers) == placed
    for layer in layers.values():
        ours, again = layer.adapters["default"], layer.adapters["again"]
        np.testing.assert_array_equal(ours.a, again.a)
        np.testing.assert_array_equal(ours.b, again.b)
    kl.unload_lora(backbone)


def placed_layers(weights: HuggingFaceWeights) -> set[str]:
    return {path for blocks in blocks_by_module(weights).values() for path in blocks}


def layers_cell(weights: HuggingFaceWeights) -> str:
    placed = placed_layers(weights)
    bare = dict.fromkeys(set(weights.blocks) - placed, "a bare parameter in the Hugging Face model")
    refused = {**weights.refused, **bare}
    found, total = len(placed), len(placed) + len(refused)
    if found == total:
        return str(found)
    reasons = dict.fromkeys(reason.partition(":")[0] for reason in refused.values())
    ends = dict.fromkeys(path.rpartition("/")[2] for path in sorted(refused))
    names = ", ".join(f"`{end}`" for end in ends)
    return f"{found} of {total}; not {names}: {'; '.join(reasons)}"


def modules_of(weights: HuggingFaceWeights) -> list[str]:
    """The names of the modules, in the order of the model; how many layers share one."""
    fused: dict[str, int] = {}
    for module, blocks in blocks_by_module(weights).items():
        name = short_name(module)
        fused[name] = max(len(blocks), fused.get(name, 0))
    return [f"`{name}`" + (f" ({count})" if count > 1 else "") for name, count in fused.items()]


def short_name(module: str) -> str:
    """The last segment, with those before it as long as it says little."""
    segments = module.split(".")
    n = next(n for n, s in enumerate(reversed(segments), 1) if not _says_little(s))
    return ".".join(segments[-n:])


def _says_little(segment: str) -> bool:
    return segment in GENERAL or segment.removeprefix("layer").isdigit()


def compared(model_type: str, exact: bool) -> str:
    """`exact`: the class is the one that the tests get from KerasHub."""
    if not exact or model_type not in HUGGING_FACE_MODELS:
        return "names only"
    if model_type not in CASES:
        return "weights"
    return "outputs, without routers" if model_type in KERAS_OPTIONS else "outputs"


def rows() -> Iterator[Row]:
    types = model_types()
    for name, factory in BACKBONES.items():
        for model_type, exact in types.get(name, {}).items():
            backbone, _ = factory()
            yield Row(edited(backbone, model_type), model_type, compared(model_type, exact))


def model_types() -> dict[str, dict[str, bool]]:
    """For each backbone class the model types; true where the converter makes that very class."""
    converters = {t: module.backbone_cls for t, module in converter_modules().items()}
    found: dict[str, dict[str, bool]] = {}
    for name in backbone_names():
        cls = getattr(keras_hub.models, name, None)
        exact = {t: True for t, c in converters.items() if c is cls}
        derived = {t: False for t, c in converters.items() if cls and issubclass(c, cls)}
        if exact or derived:
            found[name] = exact or derived
    return found


def edited(backbone: keras.Model, model_type: str) -> keras.Model:
    """A tiny backbone, as one of this model type is."""
    changes = CHANGES.get(model_type)
    if not changes:
        return backbone
    config = {k: changes.get(k, v) for k, v in backbone.get_config().items()}
    return type(backbone).from_config(config)


def backbone_names() -> list[str]:
    """Every class once, under the name that it has itself."""
    found = {name: getattr(keras_hub.models, name) for name in dir(keras_hub.models)}
    classes = {c for n, c in found.items() if n.endswith("Backbone") and n != "Backbone"}
    return sorted({*(c.__name__ for c in classes), *BACKBONES})


def page() -> str:
    table = [f"| {' | '.join(row.cells())} |\n" for row in rows()]
    without = [name for name in backbone_names() if name not in model_types()]
    lists = {
        "with_layers": _listed(name for name in without if name in BACKBONES),
        "others": _listed(name for name in without if name not in BACKBONES),
    }
    head = HEAD.format(version=keras_hub.__version__)
    return head + "".join(table) + NO_CONVERTER.format(**lists)


def _listed(names: Iterator[str]) -> str:
    return ", ".join(f"`{name.removesuffix('Backbone')}`" for name in names)


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of Keras and KerasHub about tiny models
    (Path(sys.argv[1]) if sys.argv[1:] else PAGE).write_text(page())
