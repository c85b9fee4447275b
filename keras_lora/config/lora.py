"""`LoRAConfig`: what to adapt in a model, and how."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from keras_lora.checks import check_alpha, check_rank, invalid
from keras_lora.config.checking import (
    Targets,
    check_names,
    check_start,
    check_targets,
    pattern_of,
    tokens_of,
)
from keras_lora.config.spec import DEFAULT_INIT, AdapterSpec
from keras_lora.initializers import start_of
from keras_lora.plain_values import make_plain, to_write

BIASES = ("none", "lora_only", "all")
# A rank or an alpha that `apply_lora` finds.
AUTO = "auto"
Auto: TypeAlias = Literal["auto"]

# What other libraries call the fields.
_OTHER_NAMES = {
    "r": "rank",
    "lora_rank": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "exclude_modules": "exclude",
    "modules_to_save": "layers_to_save",
    "init_lora_weights": "init",
    "trainable_token_indices": "train_tokens",
}

# Fields that version 0.1.0 does not know. At their defaults no file has them: 0.1.0 reads it then.
_LATER_FIELDS = ("freeze_a", "train_tokens", "settled")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers of a model to adapt, and how; validated once, when made.

    Args:
        rank: Rank of every adapter, unless `rank_pattern` says otherwise. `"auto"`: what the data
            need, found by `apply_lora(model, config, data=batches)`, which has the rule.
        alpha: Numerator of the scale: `s = alpha / rank`, or `alpha / sqrt(rank)`. `"auto"`: `s` is
            2 whatever the rank; with rsLoRA `2 sqrt(8 / rank)`.
        dropout: Dropout on the adapter's input while training, in `[0, 1)`.
        targets: What to adapt; see `keras_lora.find_targets` for every form.
        exclude: Names to leave out of `targets`, written as names in `targets` are.
        rank_pattern: `{name: rank}` for layers whose rank differs. The first match counts.
        alpha_pattern: `{name: alpha}`, likewise.
        use_rslora: Scale by `alpha / sqrt(rank)` (rank-stabilised LoRA).
        use_dora: Also train a magnitude of each output (DoRA); see `AdapterSpec`.
        init: How `A` and `B` start; see `AdapterSpec`.
        bias: Which biases train: `"none"`, those of the adapted layers (`"lora_only"`), or
            every variable called `bias` in the model (`"all"`).
        layers_to_save: Names of layers that train in full beside the adapters, such as a
            fresh classifier head.
        freeze_a: Train `B` alone (LoRA-FA); see `AdapterSpec`.
        train_tokens: Token ids, such as those of new tokens, whose rows in the input embedding
            train in full and are saved with the adapter; or `{name of an embedding: ids}`. The
            matrix itself stays `W0`. The embedding may be a target beside this or not.
        settled: How `"auto"` was settled, in words. `apply_lora` writes it, with the numbers that
            take the place of `"auto"`, into the config of the adapter, which files keep and
            `lora_summary` prints.

    Raises:
        ValueError: a value outside the above; the message says which values are expected.

    Example:

    >>> config = LoRAConfig(rank=4, alpha=8, targets=["query", "value"])
    >>> LoRAConfig.from_json(config.to_json()) == config
    True
    """

    rank: int | Auto = 8
    alpha: float | Auto = 16.0
    dropout: float = 0.0
    targets: Targets = "all-linear"
    exclude: Sequence[str] = ()
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    init: str = DEFAULT_INIT
    bias: Literal["none", "lora_only", "all"] = "none"
    layers_to_save: Sequence[str] = ()
    freeze_a: bool = False
    train_tokens: Sequence[int] | Mapping[str, Sequence[int]] = ()
    settled: str = ""

    def __new__(cls, *args: Any, **fields: Any) -> LoRAConfig:
        """Refuse, with the names to write, fields that the class does not have."""
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = [name for name in fields if name not in known]
        if args or unknown:
            named = [f"{_OTHER_NAMES[name]}=" for name in unknown if name in _OTHER_NAMES]
            raise TypeError(
                f"Expected fields of LoRAConfig by name: {known}. Received: "
                f"{[*args, *(f'{name}={fields[name]!r}' for name in unknown)]}; "
                f"{'write ' + ', '.join(named) if named else 'try LoRAConfig(rank=8)'}."
            )
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._check_auto()
        rank, alpha = (1 if is_auto(value) else None for value in (self.rank, self.alpha))
        self.spec(rank=rank, alpha=alpha)
        check_targets(self.targets)
        if not callable(self.targets) and not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        for name in ("exclude", "layers_to_save"):
            object.__setattr__(self, name, check_names(name, getattr(self, name)))
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            object.__setattr__(self, name, pattern_of(name, getattr(self, name), check))
        if self.bias not in BIASES:
            raise invalid("bias", f"one of {BIASES}", self.bias)
        object.__setattr__(self, "train_tokens", tokens_of(self.train_tokens))
        own = [] if isinstance(self.alpha, str) else [self.alpha]
        check_start(self.init, [*own, *self.alpha_pattern.values()])
        make_plain(self)

    def _check_auto(self) -> None:
        if not isinstance(self.settled, str):
            raise invalid("settled", "words, which apply_lora writes", self.settled)
        if not is_auto(self.rank):
            return
        for name in ("rank_pattern", "alpha_pattern"):
            if getattr(self, name):
                fix = "remove it, or give a rank"
                expected = "no pattern with rank='auto', which finds those of the layers"
                raise invalid(name, expected, getattr(self, name), fix)
        if start_of(self.init).measures == "weights":
            fix = "give a rank, or take another start"
            expected = "a start without a model as its data with rank='auto', which needs batches"
            raise invalid("init", expected, self.init, fix)

    @property
    def is_settled(self) -> bool:
        """Whether rank and alpha are numbers."""
        return not (is_auto(self.rank) or is_auto(self.alpha))

    def spec(self, *, rank: int | None = None, alpha: float | None = None) -> AdapterSpec:
        """The spec of one layer, with its own rank or alpha where a pattern gives them.

        Raises:
            ValueError: a rank or an alpha that is yet to be found.
        """
        own: dict[str, Any] = {"rank": self.rank if rank is None else rank}
        own |= {"alpha": self.alpha if alpha is None else alpha}
        for name, value in own.items():
            if is_auto(value):
                raise unsettled(name)
        return AdapterSpec(
            **own,
            dropout=self.dropout,
            use_rslora=self.use_rslora,
            use_dora=self.use_dora,
            init=self.init,
            freeze_a=self.freeze_a,
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, which JSON can contain.

        Raises:
            ValueError: `targets` is a function, which no file can contain.
        """
        if callable(self.targets):
            raise invalid(
                "targets",
                "a preset, a pattern or a list of names in a config that is to be written",
                self.targets,
                "list the paths: targets=[t.path for t in find_targets(model, function)]",
            )
        return to_write(self, _LATER_FIELDS)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoRAConfig:
        """The inverse of `to_dict`."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(
                f"Expected only fields of LoRAConfig: {sorted(known)}. Received also: {unknown}. "
                "Remove them, or install the version of keras-lora that wrote them."
            )
        return cls(**values)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> LoRAConfig:
        """The inverse of `to_json`."""
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError(f"Expected a JSON object. Received: {type(values).__name__}.")
        return cls.from_dict(values)


def is_auto(value: object) -> bool:
    return isinstance(value, str) and value == AUTO


def unsettled(name: str) -> ValueError:
    """The error of who needs numbers and is given a config that `apply_lora` has not settled."""
    fix = "apply_lora(model, config, data=batches) finds it; or give a number"
    return invalid(name, "a number", AUTO, fix)


def check_settled(config: LoRAConfig) -> None:
    """
    Raises:
        ValueError: a rank or an alpha that is yet to be found.
    """
    for name in ("rank", "alpha"):
        if is_auto(getattr(config, name)):
            raise unsettled(name)
