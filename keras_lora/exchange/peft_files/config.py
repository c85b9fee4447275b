"""The fields of PEFT's `LoraConfig`: which of them change the computation, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keras_lora.checks import check_alpha, check_rank
from keras_lora.config import BIASES, AdapterSpec
from keras_lora.exchange.peft_files.expressions import compiled
from keras_lora.exchange.problems import Problems

# The fields that are read, with the defaults of PEFT 0.21. Each field of PEFT is in one of these
# four collections: a test compares them with `LoraConfig`.
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
    "trainable_token_indices": None,
    "target_parameters": None,
}
# Fields that say nothing more than the tensors do, or that serve only training or the search for
# the base model. `fan_in_fan_out` tells how the base stores its matrix, not how A and B are stored.
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
# Fields that change the computation where their value is true, each with its default and the
# reason why such an adapter cannot be read.
REFUSED: Mapping[str, tuple[Any, str]] = {
    "alora_invocation_tokens": (None, "the adapter is active only from certain tokens on (aLoRA)"),
    "arrow_config": (None, "each token gets a mixture of several adapters (Arrow)"),
    "kasa_config": (
        None,
        "the base is truncated, and a diagonal matrix stands between A and B (KaSA)",
    ),
    "layer_replication": (None, "the base is rebuilt with some layers repeated"),
    "megatron_config": (None, "the layers are the parallel layers of Megatron"),
    "monteclora_config": (None, "the adapter's weights are random samples (MonteCLoRA)"),
    "use_bdlora": (None, "A or B is block-diagonal and stored as its blocks (BD-LoRA)"),
    "use_qalora": (False, "the inputs are pooled before A (QA-LoRA)"),
}
# A field of `LoraConfig` that PEFT never writes.
NOT_SAVED = ("runtime_config",)

DEFAULTS = {**UNDERSTOOD, **HARMLESS, **{name: value for name, (value, _) in REFUSED.items()}}

# What the checks of values and the compiling of expressions raise.
_ERRORS = (ValueError, OverflowError, RecursionError, re.error)
# The values of `init_lora_weights` that leave the base unchanged.
_BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_TYPES: Mapping[str, tuple[type, ...]] = {
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
    "use_rslora": (bool,),
    "use_dora": (bool,),
    "lora_bias": (bool,),
    "ensure_weight_tying": (bool,),
    "trainable_token_indices": (list, dict, type(None)),
    "target_modules": (list, str, type(None)),
    "exclude_modules": (list, str, type(None)),
    "layers_to_transform": (list, int, type(None)),
    "layers_pattern": (list, str, type(None)),
    "target_parameters": (list, type(None)),
}


@dataclass(frozen=True)
class Settings:
    """The fields that give the tensors their meaning, checked."""

    config: Mapping[str, Any]
    ranks: Pattern
    alphas: Pattern
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    parameters: Sequence[str]


@dataclass(frozen=True)
class Pattern:
    """A value for each module: the value of the first expression that matches its name."""

    values: Mapping[str, Any]
    default: Any
    expressions: Mapping[str, re.Pattern[str]]

    def of(self, name: str) -> Any:
        # As `peft.utils.other.get_pattern_key`: without a match the name itself is the key.
        matching = (key for key, pattern in self.expressions.items() if pattern.match(name))
        return self.values.get(next(matching, name), self.default)


def parse_config(config: Mapping[str, Any], problems: Problems) -> Settings | None:
    """The settings; or None, with everything that is wrong added to `problems`."""
    found = Problems()
    settings = _settings({**UNDERSTOOD, **config}, found) if _is_lora(config, found) else None
    problems.add(*found)
    return None if found else settings


def _is_lora(config: Mapping[str, Any], problems: Problems) -> bool:
    """Whether the fields have the types and values of a LoRA adapter that can be read."""
    if config.get("peft_type") != "LORA":
        problems.add(f"peft_type: {config.get('peft_type')!r} is not 'LORA'")
        return False
    given = {**UNDERSTOOD, **config}
    # PEFT always writes these two, although it has defaults for them.
    problems.add(*(f"{name}: missing" for name in ("r", "lora_alpha") if name not in config))
    problems.add(*(f"{name}: {why}" for name, (_, why) in REFUSED.items() if config.get(name)))
    _check_init(given["init_lora_weights"], problems)
    _check_types(given, problems)
    return not problems


def _settings(given: Mapping[str, Any], problems: Problems) -> Settings:
    settings = Settings(
        config=given,
        ranks=_pattern(given, "r", "rank_pattern", check_rank, problems),
        alphas=_pattern(given, "lora_alpha", "alpha_pattern", check_alpha, problems),
        use_rslora=given["use_rslora"],
        use_dora=given["use_dora"],
        lora_bias=given["lora_bias"],
        parameters=given["target_parameters"] or (),
    )
    _check_selection(given, problems)
    return settings


def unknown_fields(config: Mapping[str, Any]) -> list[str]:
    return sorted(set(config) - set(DEFAULTS) - set(NOT_SAVED))


def is_targeted(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT would adapt a module of that name, as its `check_target_module_exists` says."""
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
        return bool(compiled(names).fullmatch(name))
    return name in names or any(name.endswith(f".{n}") for n in names)


def _in_layers(config: Mapping[str, Any], name: str) -> bool:
    layers = config["layers_to_transform"]
    if layers is None or layers == []:
        return True
    wanted = {str(i) for i in (layers if isinstance(layers, list) else [layers])}
    found = (compiled(e).match(name) for e in _layer_expressions(config))
    match = next((m for m in found if m), None)
    return match is not None and (match["idx"].lstrip("0") or "0") in wanted


def _layer_expressions(config: Mapping[str, Any]) -> list[str]:
    patterns = config["layers_pattern"]
    if not patterns:
        return [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    patterns = [patterns] if isinstance(patterns, str) else patterns
    return [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]


def _check_init(init: object, problems: Problems) -> None:
    if (init.lower() if isinstance(init, str) else init) not in _BASE_UNCHANGED:
        problems.add(
            f"init_lora_weights: {init!r} changes the base's weights too, so that A B is only a "
            "part of the training; convert the adapter to plain LoRA in PEFT with "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )


def _check_types(config: Mapping[str, Any], problems: Problems) -> None:
    for name, types in _TYPES.items():
        if not isinstance(config[name], types):
            expected = [t.__name__ for t in types]
            problems.add(
                f"{name}: of type {type(config[name]).__name__}, expected one of {expected}"
            )
    if config["bias"] not in BIASES:
        problems.add(f"bias: {config['bias']!r} is none of {BIASES}")
    with problems.caught(*_ERRORS, part="lora_dropout"):
        AdapterSpec(rank=1, alpha=1, dropout=config["lora_dropout"])


def _pattern(
    config: Mapping[str, Any],
    name: str,
    pattern: str,
    check: Callable[[object], None],
    problems: Problems,
) -> Pattern:
    values = config[pattern] or {}
    given = {name: config[name], **{f"{pattern}[{key!r}]": v for key, v in values.items()}}
    for field, value in given.items():
        with problems.caught(*_ERRORS, part=field):
            check(value)
    expressions: dict[str, re.Pattern[str]] = {}
    for key in values:
        with problems.caught(*_ERRORS, part=f"{pattern}[{key!r}]"):
            expressions[key] = compiled(rf"(.*\.)?({key})$")
    return Pattern(values, config[name], expressions)


def _check_selection(config: Mapping[str, Any], problems: Problems) -> None:
    fields = ("target_modules", "exclude_modules", "layers_pattern", "target_parameters")
    types = dict.fromkeys(fields, str) | {"layers_to_transform": int}
    wrong = [
        f"{name}: not all of its values are of type {kind.__name__}"
        for name, kind in types.items()
        if isinstance(config[name], list) and not all(isinstance(v, kind) for v in config[name])
    ]
    problems.add(*wrong)
    expressions = [config[n] for n in fields[:2] if isinstance(config[n], str)]
    for expression in [] if wrong else [*expressions, *_layer_expressions(config)]:
        with problems.caught(*_ERRORS, part=repr(expression)):
            compiled(expression)
