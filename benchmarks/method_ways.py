"""The ways to train that `methods.py` compares."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import training
from comparing import train_everything
from encoder import train_only
from minilm import CONFIG, HEAD
from rich.console import Console

import keras_lora as kl

QUIET = Console(quiet=True)
RANKS = (1, 2, 4, 8, 16, 32, 64)
# Learning rates that are tried on validation rows. The first of each is the best on Rotten Tomatoes
# of the four that `examples/text_classification.py --sweep` tried, adapters at rank 8.
FULL_RATES = (2e-4, 1e-4, 4e-4)
HEAD_RATES = (1e-3, 3e-3, 1e-2)
LORA_RATES = (2e-3, 1e-3, 4e-3)


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        prepare: What is done with a new model; it is given batches of seed 0 too.
        rates: What is tried on validation rows; empty where the library finds the rate.
        callbacks: Those of `fit`, made for each run.
        epochs: How many parts, each with a validation, the steps come in.
        smaller: By the name of a row, what is done after training, to be scored again.
    """

    prepare: Callable[[keras.Model, Any], object]
    rates: Sequence[float] = LORA_RATES
    callbacks: Callable[[], list[keras.callbacks.Callback]] = list
    epochs: int = 1
    smaller: Mapping[str, Callable[[keras.Model], object]] = field(default_factory=dict)


def adapted(**options: Any) -> Callable[[keras.Model, Any], object]:
    return lambda model, _: kl.apply_lora(model, replace(CONFIG, **options))


def found(model: keras.Model, batches: Any) -> object:
    return kl.apply_lora(model, replace(CONFIG, rank="auto", alpha="auto"), data=batches)


def with_a_rate_for_b(model: keras.Model, _: Any) -> None:
    kl.apply_lora(model, CONFIG)
    optimizer = kl.LoRAPlus(keras.optimizers.Adam(), ratio=16)
    training.compile_for_training(model, jit=model.jit_compile, optimizer=optimizer)


def with_enable_lora(model: keras.Model, _: Any) -> None:
    """Keras's own adapters on the layers that `CONFIG` adapts."""
    for target in kl.find_targets(model, CONFIG.targets, HEAD):
        target.layer.enable_lora(CONFIG.rank, lora_alpha=CONFIG.alpha)
    heads = _heads(model)
    train_only(model, lambda v: "lora_" in v.name or id(v) in heads)


def train_head(model: keras.Model, _: Any) -> None:
    heads = _heads(model)
    train_only(model, lambda v: id(v) in heads)


def _heads(model: keras.Model) -> set[int]:
    """The ids of the variables of the heads."""
    within = {name: model if name == "logits" else model.backbone for name in HEAD}
    return {id(v) for name, part in within.items() for v in part.get_layer(name).weights}


def lower_the_rank() -> list[keras.callbacks.Callback]:
    return [kl.RankSchedule("val_loss", tolerance=0.01, verbose=0)]


def keep_most(model: keras.Model) -> None:
    kl.shrink_adapter(model, "default", energy=0.95, console=QUIET)


WAYS: dict[str, Way] = {
    "full fine-tuning": Way(lambda model, _: train_everything(model), FULL_RATES),
    "auto": Way(found, rates=()),
    "rank 8": Way(adapted()),
    "rank 16": Way(
        adapted(rank=16, alpha=32), smaller={"rank 16, shrunk to 95% of its energy": keep_most}
    ),
    "head only": Way(train_head, HEAD_RATES),
    **{f"rank {r}": Way(adapted(rank=r, alpha=2 * r)) for r in RANKS if r not in {8, 16}},
    "enable_lora, rank 8": Way(with_enable_lora),
    "attention, rank 8": Way(adapted(targets="attention")),
    "DoRA, rank 8": Way(adapted(use_dora=True)),
    "rsLoRA, rank 8": Way(adapted(use_rslora=True)),
    "LoRA+, rank 8": Way(with_a_rate_for_b),
    "schedule from rank 16": Way(adapted(rank=16, alpha=32), callbacks=lower_the_rank, epochs=6),
}


def rate_of(model: keras.Model, batches: Any) -> float:
    """The rate that the library suggests."""
    return kl.suggest_learning_rate(model, batches, console=QUIET).learning_rate
