"""Write an adapter's directory as `PeftModel.save_pretrained` writes it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from keras_lora.exchange.peft_files.card import CARD_FILE, default_card
from keras_lora.exchange.peft_files.config import DEFAULTS, parse_config, unknown_fields
from keras_lora.exchange.peft_files.naming import target_modules, value_and_pattern
from keras_lora.exchange.peft_files.reading import WEIGHTS_FILE, peft_error
from keras_lora.exchange.peft_files.tensors import (
    PREFIX,
    Array,
    PeftModule,
    build_modules,
    file_tensors,
    sort_keys,
    wrapped,
)
from keras_lora.files.adapter_files import CONFIG_FILE, TENSORS_FILE, PathLike
from keras_lora.files.atomic import leftovers, new_files, temporary_path
from keras_lora.files.reading import (
    CODES,
    CONFIG_LIMIT,
    DTYPES,
    check_size,
    explained,
    key_problem,
)


def write_peft_adapter(
    directory: PathLike,
    modules: Mapping[str, PeftModule],
    saved: Mapping[str, Array] | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    all_modules: Sequence[str] | None = None,
    dtype: str | Mapping[str, str] = "float32",
    overwrite: bool = False,
    model_card: str | None = None,
) -> None:
    """Write an adapter that PEFT loads by `PeftModel.from_pretrained(base, directory)`.

    The config is moved in last, since a directory without it is no adapter to any program. Where
    another config is replaced, it is moved away first. So a process killed at any moment leaves
    the old adapter, the new one or, if killed between those moves, a directory that is refused
    for its missing config: never the tensors of one under the config of the other.

    Args:
        directory: Where to; made, with its parents, if it does not exist. Other files in it stay.
        modules: What is added to each module, under its name in the Hugging Face model.
        saved: Parameters that take the place of the base's, under their full names.
        config: Fields of PEFT's `LoraConfig` that the tensors do not tell, such as
            `base_model_name_or_path`, `task_type`, `lora_dropout`, `bias`, `modules_to_save` and
            `fan_in_fan_out`. Those that they do tell are replaced, so that the config of
            another adapter may be given.
        all_modules: The names of all modules of the base that `target_modules` could hit. With
            them it is a short list such as `["q_proj"]`; without, the whole names.
        dtype: What to cast the tensors to, or a dtype for each key, as `PeftAdapter.dtypes` has
            them; keys that are not in it are written in float32.
        overwrite: Replace an adapter that is there.
        model_card: The text of `README.md`. By default a short one, unless there is one.

    Raises:
        AdapterFileError: what is given could not be read again, an adapter is there and
            `overwrite` is false, or the system refuses.

    Example:

    >>> import tempfile
    >>> module = PeftModule(a=np.ones((2, 7)), b=np.ones((5, 2)), rank=2, alpha=8)
    >>> directory = tempfile.mkdtemp()
    >>> write_peft_adapter(directory, {"layers.0.q_proj": module}, all_modules=["layers.0.q_proj"])
    >>> sorted(p.name for p in Path(directory).iterdir())
    ['README.md', 'adapter_config.json', 'adapter_model.safetensors']
    """
    root = Path(directory)
    tensors = _cast(root, file_tensors(modules, saved or {}), dtype)
    fields = _fields(root, modules, config or {}, all_modules)
    _check(root, fields, tensors, modules, saved or {})
    contents = {
        CARD_FILE: (default_card(fields) if model_card is None else model_card).encode(),
        WEIGHTS_FILE: save(tensors, {"format": "pt"}),
        CONFIG_FILE: _json(root, fields),
    }
    check_size(root / CONFIG_FILE, len(contents[CONFIG_FILE]), CONFIG_LIMIT)
    with explained(root):
        _check_target(root, overwrite)
        if model_card is None and (root / CARD_FILE).exists():
            del contents[CARD_FILE]
        root.mkdir(parents=True, exist_ok=True)
        for file in leftovers(root, (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)):
            file.unlink()
        _replace(root, contents)


def _cast(
    root: Path, tensors: Mapping[str, Array], dtype: str | Mapping[str, str]
) -> dict[str, Array]:
    names = {k: dtype if isinstance(dtype, str) else dtype.get(k, "float32") for k in tensors}
    unknown = sorted({name for name in names.values() if name not in CODES})
    if unknown:
        raise peft_error(root, [f"dtype {unknown}, expected some of {sorted(CODES)}"])
    with np.errstate(over="ignore"):  # infinity is reported with its key
        return {
            key: np.asarray(tensor, dtype=DTYPES[CODES[names[key]]], order="C")
            for key, tensor in tensors.items()
        }


def _fields(
    root: Path,
    modules: Mapping[str, PeftModule],
    config: Mapping[str, Any],
    all_modules: Sequence[str] | None,
) -> dict[str, Any]:
    problems = [f"{name}: no field of LoraConfig" for name in unknown_fields(config)]
    problems += [] if modules else ["no modules"]
    use_rslora = {module.use_rslora for module in modules.values()}
    if len(use_rslora) > 1:
        problems.append("use_rslora in some modules only, for which PEFT has no field")
    if problems:
        raise peft_error(root, problems)
    r, rank_pattern = value_and_pattern({n: int(m.rank) for n, m in modules.items()})
    alpha, alpha_pattern = value_and_pattern({n: _number(m.alpha) for n, m in modules.items()})
    return {
        **DEFAULTS,
        **{name: value for name, value in config.items() if name in DEFAULTS},
        "r": r,
        "rank_pattern": rank_pattern,
        "lora_alpha": alpha,
        "alpha_pattern": alpha_pattern,
        "target_modules": target_modules(modules, all_modules),
        "use_rslora": use_rslora.pop(),
        "use_dora": any(m.magnitude is not None for m in modules.values()),
        "lora_bias": any(m.bias is not None for m in modules.values()),
        # The list of targets tells these.
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "inference_mode": True,
    }


def _json(root: Path, fields: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(fields, indent=2, sort_keys=True, allow_nan=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise peft_error(root, [f"a config that JSON cannot hold: {error}"]) from error


def _number(value: float) -> float:
    """Whole numbers as PEFT has them."""
    return int(value) if float(value).is_integer() else float(value)


def _check(
    root: Path,
    fields: Mapping[str, Any],
    tensors: Mapping[str, Array],
    modules: Mapping[str, PeftModule],
    saved: Mapping[str, Array],
) -> None:
    """Read in memory what would be written."""
    problems = [f"{k!r}: {wrong}" for k in tensors if (wrong := key_problem(k))]
    problems += [f"{k}: NaN or infinity" for k, t in tensors.items() if not np.isfinite(t).all()]
    settings = parse_config(fields, problems)
    if settings is None:
        raise peft_error(root, problems)
    keys = sort_keys(tensors, problems)
    problems += [f"{key!r}: no name of a parameter" for key in keys.unknown]
    read = build_modules(keys, tensors, settings, problems)
    meant = {PREFIX + wrapped(name, modules): name for name in saved}
    if {key: name for name, key in keys.saved.items()} != meant:
        problems.append(f"names of parameters that mean others to PEFT among {sorted(saved)}")
    problems += [
        f"{name}: would be read with another rank or scale"
        for name, module in modules.items()
        if name in read and (read[name].rank, read[name].scaling) != (module.rank, module.scaling)
    ]
    if problems:
        raise peft_error(root, problems)


def _check_target(root: Path, overwrite: bool) -> None:
    files = [root / name for name in (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)]
    problems = [
        f"{file.name} is a link, directory or device; remove it"
        for file in files
        if file.is_symlink() or (file.exists() and not file.is_file())
    ]
    if (root / TENSORS_FILE).exists():
        problems.append("an adapter of keras_lora itself is there; write elsewhere")
    elif not overwrite and any(file.exists() for file in files[:2]):
        problems.append("an adapter is there; pass overwrite=True to replace it")
    if problems:
        raise peft_error(root, problems)


def _replace(root: Path, contents: Mapping[str, bytes]) -> None:
    config, old = root / CONFIG_FILE, temporary_path(root, CONFIG_FILE)
    with new_files(root, contents) as temporary:
        try:
            if config.exists() and config.read_bytes() != contents[CONFIG_FILE]:
                config.replace(old)
            for name, file in temporary.items():
                file.replace(root / name)
        finally:
            if old.exists() and temporary[WEIGHTS_FILE].exists():
                old.replace(config)
            old.unlink(missing_ok=True)
