"""What to adapt and how: `LoRAConfig` for a model, `AdapterSpec` for one layer of it."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from keras_lora.checks import (
    check_alpha,
    check_rank,
    check_tokens,
    invalid,
    is_flag,
    is_number,
)
from keras_lora.initializers import start_of
from keras_lora.lowrank.equations import scaling
from keras_lora.plain_values import make_plain, to_write

DEFAULT_INIT = "kaiming_uniform"
PRESETS = ("attention", "all-linear", "convolutions", "experts", "all")
BIASES = ("none", "lora_only", "all")

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
_LATER_FIELDS = ("freeze_a", "train_tokens")

Targets = str | Sequence[str] | Callable[[Any], bool]


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """Rank, scale and options of one adapter on one layer.

    `h = x W0 + s (drop(x) A) B` with `s = alpha / rank` (`alpha / sqrt(rank)` for rsLoRA).

    Args:
        rank: Inner size of `A B`; a positive integer.
        alpha: Numerator of the scale `s`; a finite number.
        dropout: Probability with which an input of the adapter is zeroed while training, in
            `[0, 1)`. The frozen kernel's own input is not dropped. An embedding adapter has no
            dropout, as in PEFT, since it is fed token ids.
        use_rslora: Divide by `sqrt(rank)` instead of `rank`.
        use_dora: Also train a magnitude `m` of each output, which starts at `|W0|`:
            `W = m (W0 + s A B) / |W0 + s A B|`.
        init: How `A` and `B` start. A fresh adapter changes nothing, and `W0` never changes.

            - `"kaiming_uniform"`: `A` uniform within `±1/sqrt(d)` for `d` inputs (as PEFT does),
              `B` zero; `"gaussian"`: `A` normal with standard deviation `1/rank`, `B` zero. An
              embedding adapter has its own start instead: `A` zero and `B` standard normal.
            - `"orthogonal"`: both random, with `A B = 0`.
            - `"pissa"`: the principal part of `W0`, `s A0 B0 = U_r S_r V_r^T`; `"pissa:4"` by a
              randomised SVD with 4 power iterations. `"olora"`: orthonormal `B0` from the QR
              decomposition of `W0`. Both need a positive `alpha`, and compute with
              `s (A B - A0 B0)`, where `A0` and `B0` are frozen copies.
            - `"eva"`: `A` along the directions in which the layer's inputs vary most, `B` zero;
              `"lora_ga"`: both along the gradient of `W0`, with frozen copies. They need
              `apply_lora(model, config, data=batches)`, and adapt linear layers alone.
            - `"loftq"`: the best correction of a quantized `W0`, by
              `apply_lora(model, config, data=float_model)`. A fresh adapter is then nearer to
              that model than its base is, and differs from its base.

        freeze_a: Train `B` alone (LoRA-FA): `A` stays as it starts, and has no gradient, for which
            the inputs of the layer would be kept. Not for embeddings, whose `A` starts at zero.
        train_tokens: Tokens of an embedding whose rows train in full, as values of the adapter; in
            sorted order. Beside them the rank may be 0: there is no `A B` then.

    Raises:
        ValueError: a value outside the above.

    Example:

    >>> AdapterSpec(rank=4, alpha=8).scaling
    2.0

    References: Hu et al. 2021, https://arxiv.org/abs/2106.09685; Kalajdzievski 2023 (rsLoRA),
    https://arxiv.org/abs/2312.03732; Liu et al. 2024 (DoRA), https://arxiv.org/abs/2402.09353;
    Zhang et al. 2023 (LoRA-FA), https://arxiv.org/abs/2308.03303.
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    init: str = DEFAULT_INIT
    freeze_a: bool = False
    train_tokens: Sequence[int] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "train_tokens", check_tokens(self.train_tokens))
        if self.rank != 0 or not self.train_tokens:
            check_rank(self.rank)
        check_alpha(self.alpha)
        if not is_number(self.dropout) or not 0 <= self.dropout < 1:
            raise invalid("dropout", "a number in [0, 1)", self.dropout, "try dropout=0.05")
        for name in ("use_rslora", "use_dora", "freeze_a"):
            if not is_flag(getattr(self, name)):
                raise invalid(name, "True or False", getattr(self, name))
        start_of(self.init)
        make_plain(self)

    @property
    def scaling(self) -> float:
        return scaling(self.alpha, self.rank or 1, self.use_rslora)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, which JSON can contain."""
        return to_write(self, _LATER_FIELDS)

    @property
    def has_counterpart(self) -> bool:
        """Whether `A0 B0`, with which the adapter begins, is taken off again."""
        return start_of(self.init).has_counterpart


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Which layers of a model to adapt, and how; validated once, when made.

    Args:
        rank: Rank of every adapter, unless `rank_pattern` says otherwise.
        alpha: Numerator of the scale: `s = alpha / rank`, or `alpha / sqrt(rank)`.
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

    Raises:
        ValueError: a value outside the above; the message says which values are expected.

    Example:

    >>> config = LoRAConfig(rank=4, alpha=8, targets=["query", "value"])
    >>> LoRAConfig.from_json(config.to_json()) == config
    True
    """

    rank: int = 8
    alpha: float = 16.0
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
        self.spec()
        check_targets(self.targets)
        if not callable(self.targets) and not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))
        for name in ("exclude", "layers_to_save"):
            object.__setattr__(self, name, check_names(name, getattr(self, name)))
        for name, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            object.__setattr__(self, name, _pattern(name, getattr(self, name), check))
        if self.bias not in BIASES:
            raise invalid("bias", f"one of {BIASES}", self.bias)
        object.__setattr__(self, "train_tokens", _tokens(self.train_tokens))
        check_start(self.init, [self.alpha, *self.alpha_pattern.values()])
        make_plain(self)

    def spec(self, *, rank: int | None = None, alpha: float | None = None) -> AdapterSpec:
        """The spec of one layer, with its own rank or alpha where a pattern gives them."""
        return AdapterSpec(
            rank=self.rank if rank is None else rank,
            alpha=self.alpha if alpha is None else alpha,
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


def check_start(init: str, alphas: Iterable[float]) -> None:
    """
    Raises:
        ValueError: a part of `W0` cannot be `s A0 B0`, since the scale `s` is not positive.
    """
    start = start_of(init)
    divides = start.has_counterpart or start.measures == "weights"
    wrong = [alpha for alpha in alphas if alpha <= 0] if divides else []
    if wrong:
        raise invalid("alpha", f"a positive number for init={init!r}", wrong[0])


def _tokens(tokens: object) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    if not isinstance(tokens, Mapping):
        return check_tokens(tokens)
    check_names("train_tokens", list(tokens))
    if not all(map(len, tokens.values())):
        raise invalid("train_tokens", "at least one token id for each name", tokens)
    return {name: check_tokens(ids) for name, ids in tokens.items()}


def check_targets(targets: object) -> None:
    """Refuse what is no form of `targets`.

    Raises:
        ValueError: an unknown preset, or names that are no names.
    """
    if callable(targets) or targets in PRESETS:
        return
    if isinstance(targets, str):
        if targets.startswith("re:"):
            check_names("targets", [targets])
            return
        raise invalid(
            "targets",
            f"one of {PRESETS}, a pattern 're:...', a list of names, or a function of a target",
            targets,
            f"for a layer of that name write targets=[{targets!r}]",
        )
    if not check_names("targets", targets):
        raise invalid("targets", "at least one name", targets, 'try targets="all-linear"')


def check_names(field_name: str, names: object) -> tuple[str, ...]:
    """The names as a tuple.

    Raises:
        ValueError: no list, an empty name, or a regular expression that cannot be parsed.
    """
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise invalid(field_name, "a list of names", names, "put the name in a list")
    for name in names:
        if not isinstance(name, str) or not name:
            raise invalid(field_name, "names, as non-empty strings", names)
        if name.startswith("re:"):
            _check_expression(field_name, name)
    return tuple(names)


def _check_expression(field_name: str, name: str) -> None:
    try:
        re.compile(name[3:])
    except re.error as error:
        expected = f"a regular expression after 're:' ({error})"
        raise invalid(field_name, expected, name) from error


def _pattern(field_name: str, pattern: object, check: Callable[[object], None]) -> dict[str, Any]:
    if not isinstance(pattern, Mapping):
        raise invalid(field_name, "a mapping of names to values", pattern)
    check_names(field_name, list(pattern))
    for value in pattern.values():
        check(value)
    return dict(pattern)
