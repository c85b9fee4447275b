"""The fields of PEFT's `LoraConfig`: which of them change the computation, and what they say."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras_lora.checks import check_alpha, check_rank
from keras_lora.config import BIASES, AdapterSpec

# As PEFT 0.21 writes them. Every field is in one of these four; a test compares with `LoraConfig`.
UNDERSTOOD: Mapping[str, Any] = {
    "peft_type": "LORA",
    "r": 8,
    "lora_alpha": 8,
    "rank_pattern": {},
    "alpha_pattern": {},
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "bias": "none",
    "init_lora_weights": True,
    "target_modules": None,
    "exclude_modules": None,
    "layers_to_transform": None,
    "layers_pattern": None,
    "ensure_weight_tying": False,
}
# What these say is in the tensors, or serves training or the finding of the base model alone.
# `fan_in_fan_out` tells how the base keeps its matrix; A and B lie alike in both cases.
HARMLESS: Mapping[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "corda_config": None,
    "eva_config": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "loftq_config": {},
    "lora_ga_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "peft_version": None,
    "qalora_group_size": 16,
    "revision": None,
    "task_type": None,
    "velora_config": None,
}
# Each acts where its value is true; with the reason why it cannot be read.
REFUSED: Mapping[str, tuple[Any, str]] = {
    "alora_invocation_tokens": (None, "the adapter acts from certain tokens on only (aLoRA)"),
    "arrow_config": (None, "other adapters are mixed in for each token (Arrow)"),
    "kasa_config": (None, "the base is truncated and a diagonal lies between A and B (KaSA)"),
    "layer_replication": (None, "the base is rebuilt with some layers repeated"),
    "megatron_config": (None, "the layers are Megatron's parallel ones"),
    "monteclora_config": (None, "the adapter's weights are random samples (MonteCLoRA)"),
    "target_parameters": (
        None,
        "A and B belong to parameters, such as stacked experts, and are no matrices of a module",
    ),
    "trainable_token_indices": (None, "rows of an embedding are replaced, which A B is not"),
    "use_bdlora": (None, "A or B is stored by the blocks of its diagonal (BD-LoRA)"),
    "use_qalora": (False, "the inputs are pooled before A (QA-LoRA)"),
}
# PEFT never writes it.
NOT_SAVED = ("runtime_config",)

DEFAULTS = {**UNDERSTOOD, **HARMLESS, **{name: value for name, (value, _) in REFUSED.items()}}

_BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_KINDS: Mapping[str, tuple[type, ...]] = {
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "lora_bias": (bool,),
    "ensure_weight_tying": (bool,),
    "target_modules": (list, str, type(None)),
    "exclude_modules": (list, str, type(None)),
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": (list, str, type(None)),
}


@dataclass(frozen=True)
class Settings:
    """The fields that say what the tensors mean, checked."""

    config: Mapping[str, Any]
    ranks: Pattern
    alphas: Pattern
    use_rslora: bool
    use_dora: bool
    lora_bias: bool


@dataclass(frozen=True)
class Pattern:
    """A value for each module: that of the first expression which matches its name."""

    values: Mapping[str, Any]
    default: Any
    expressions: Mapping[str, re.Pattern[str]]

    def of(self, name: str) -> Any:
        # As `peft.utils.other.get_pattern_key`: without a match the name itself is the key.
        matching = (key for key, pattern in self.expressions.items() if pattern.match(name))
        return self.values.get(next(matching, name), self.default)


def parse_config(config: Mapping[str, Any], problems: list[str]) -> Settings | None:
    """The settings, or none with what is wrong added to `problems`."""
    known = len(problems)
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type: {config.get('peft_type')!r} is not 'LORA'")
        return None
    given = {**UNDERSTOOD, **config}
    # PEFT has defaults for these and writes them all the same.
    problems += [f"{name}: missing" for name in ("r", "lora_alpha") if name not in config]
    problems += [f"{name}: {why}" for name, (_, why) in REFUSED.items() if config.get(name)]
    problems += _init_problems(given["init_lora_weights"])
    problems += _kind_problems(given)
    if len(problems) > known:
        return None
    settings = Settings(
        config=given,
        ranks=_pattern(given, "r", "rank_pattern", check_rank, problems),
        alphas=_pattern(given, "lora_alpha", "alpha_pattern", check_alpha, problems),
        use_rslora=given["use_rslora"],
        use_dora=given["use_dora"],
        lora_bias=given["lora_bias"],
    )
    problems += _selection_problems(given)
    return None if len(problems) > known else settings


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    return sorted(set(config) - set(DEFAULTS) - set(NOT_SAVED))


def is_targeted(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT would adapt a module of that name, as its `check_target_module_exists`."""
    targets, excluded = config["target_modules"], config["exclude_modules"]
    if excluded and _named(excluded, name):
        return False
    if targets is None or targets == "all-linear" or config["ensure_weight_tying"]:
        return True
    if isinstance(targets, str) or name in targets:
        return _named(targets, name)
    return _named(targets, name) and _in_layers(config, name)


def _named(names: str | Sequence[str], name: str) -> bool:
    if isinstance(names, str):
        return bool(_compiled(names).fullmatch(name))
    return name in names or any(name.endswith(f".{n}") for n in names)


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    layers = config["layers_to_transform"]
    if layers is None or layers == []:
        return True
    wanted = {str(i) for i in (layers if isinstance(layers, list) else [layers])}
    found = (_compiled(e).match(name) for e in _layer_expressions(config))
    match = next((m for m in found if m), None)
    return match is not None and (match["idx"].lstrip("0") or "0") in wanted


def _layer_expressions(config: Mapping[str, Any]) -> list[str]:
    patterns = config["layers_pattern"]
    if not patterns:
        return [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]


def _init_problems(init: object) -> list[str]:
    if (init.lower() if isinstance(init, str) else init) in _BASE_UNCHANGED:
        return []
    return [
        f"init_lora_weights: {init!r} changes the base's weights too, so that A B alone is not "
        "what was trained; convert it to usual LoRA in PEFT with save_pretrained(..., "
        "path_initial_model_for_weight_conversion=...)"
    ]


def _kind_problems(config: Mapping[str, Any]) -> list[str]:
    wrong = [n for n, kinds in _KINDS.items() if not isinstance(config[n], kinds)]
    problems = [f"{n}: {type(config[n]).__name__} is not a kind of value it has" for n in wrong]
    if config["bias"] not in BIASES:
        problems.append(f"bias: {config['bias']!r} is none of {BIASES}")
    return problems + _attempt("lora_dropout", _check_dropout, config["lora_dropout"])


def _check_dropout(dropout: Any) -> None:
    AdapterSpec(rank=1, alpha=1, dropout=dropout)


def _pattern(
    config: Mapping[str, Any],
    name: str,
    pattern: str,
    check: Callable[[object], None],
    problems: list[str],
) -> Pattern:
    values = config[pattern] or {}
    given = {name: config[name], **{f"{pattern}[{key!r}]": v for key, v in values.items()}}
    for place, value in given.items():
        problems += _attempt(place, check, value)
    expressions: dict[str, re.Pattern[str]] = {}
    for key in values:
        expression = rf"(.*\.)?({key})$"
        wrong = _attempt(f"{pattern}[{key!r}]", _compiled, expression)
        expressions |= {} if wrong else {key: _compiled(expression)}
        problems += wrong
    return Pattern(values, config[name], expressions)


def _selection_problems(config: Mapping[str, Any]) -> list[str]:
    fields = ("target_modules", "exclude_modules", "layers_pattern")
    kinds = dict.fromkeys(fields, str) | {"layers_to_transform": int}
    problems = [
        f"{name}: not all of its values are of type {kind.__name__}"
        for name, kind in kinds.items()
        if isinstance(config[name], list) and not all(isinstance(v, kind) for v in config[name])
    ]
    expressions = [config[n] for n in fields[:2] if isinstance(config[n], str)]
    for expression in [] if problems else [*expressions, *_layer_expressions(config)]:
        problems += _attempt(repr(expression), _compiled, expression)
    return problems


def _attempt(place: str, check: Callable[[Any], object], value: object) -> list[str]:
    try:
        check(value)
    except (ValueError, OverflowError, RecursionError, re.error) as error:
        return [f"{place}: {error}"]
    return []


def _compiled(expression: str) -> re.Pattern[str]:
    with warnings.catch_warnings():
        # Python warns of what may mean something else one day.
        warnings.simplefilter("ignore")
        return re.compile(expression)
