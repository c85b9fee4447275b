"""Files of tiny random models of transformers, and their edits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

Save = Callable[[Path], None]


def saved(model: str, config: str, **settings: Any) -> Save:
    """A function that writes a random model of these classes of transformers."""

    def save(directory: Path) -> None:
        made = getattr(transformers, config)(**settings)
        write_model(getattr(transformers, model), made, directory)

    return save


def write_model(model_class: Any, config: Any, directory: Path) -> None:
    torch.manual_seed(3)
    model = model_class(config).to(torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # zeros and ones would hide a mix-up
            parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)


def _edited(save: Save, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> Save:
    """`save`, and a change of its settings and its tensors."""

    def edited(directory: Path) -> None:
        save(directory)
        settings, weights = directory / "config.json", directory / "model.safetensors"
        config, tensors = json.loads(settings.read_text()), load_file(weights)
        change(config, tensors)
        settings.write_text(json.dumps(config))
        save_file(tensors, weights, {"format": "pt"})

    return edited


def as_on_the_hub(
    save: Save, config: Mapping[str, Any] | None = None, keys: Mapping[str, str] | None = None
) -> Save:
    """Edit the files of transformers 5 to be like those on the Hugging Face Hub.

    `config` is added to `config.json`; `keys` maps endings of keys to the endings on the Hub.
    """

    def change(settings: dict[str, Any], tensors: dict[str, Any]) -> None:
        settings |= dict(config or {})
        for key in list(tensors):
            for ending, new in (keys or {}).items():
                if key.endswith(ending):
                    tensors[key.removesuffix(ending) + new] = tensors.pop(key)

    return _edited(save, change)


def _packed(experts: torch.Tensor) -> dict[str, torch.Tensor]:
    """Random experts in MXFP4, which KerasHub reads, put into a tensor `(experts, in, out)` too."""
    count, inputs, out = experts.shape
    codes = torch.randint(16, (count, out, inputs // 32, 32))
    scales = torch.randint(121, 124, (count, out, inputs // 32, 1))
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes % 8] * (1 - 2 * (codes // 8))
    experts.copy_((values * 2.0 ** (scales - 127)).reshape(count, out, inputs).transpose(1, 2))
    blocks = codes[..., ::2] + 16 * codes[..., 1::2]
    return {"_blocks": blocks.to(torch.uint8), "_scales": scales[..., 0].to(torch.uint8)}


def with_packed_experts(save: Save) -> Save:
    """GPT-OSS with the settings and experts of the Hub, beside the experts of transformers 5."""

    def change(settings: dict[str, Any], tensors: dict[str, Any]) -> None:
        rope = settings.pop("rope_parameters")
        settings |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
        experts = ("experts.gate_up_proj", "experts.down_proj")
        for key in [key for key in tensors if key.endswith(experts)]:
            tensors |= {key + ending: part for ending, part in _packed(tensors[key]).items()}

    return _edited(save, change)
