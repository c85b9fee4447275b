"""The model card of an adapter: front matter as PEFT writes it, and how to load the adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

CARD_FILE = "README.md"
_USAGE = """
# LoRA adapter

Rank {r}, alpha {lora_alpha}. Written by keras_lora in the format of Hugging Face PEFT.

```python
from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "path/of/this/directory")
```

In Keras, `keras_lora.load_peft_adapter(model, "path/of/this/directory")`.
"""


def default_card(config: Mapping[str, Any]) -> str:
    """The text of `README.md` for an adapter with the fields of PEFT's `LoraConfig`.

    Example:

    >>> config = {"base_model_name_or_path": "org/base", "r": 8, "lora_alpha": 16}
    >>> print(default_card(config).partition("\\n\\n")[0])
    ---
    base_model: org/base
    library_name: peft
    tags:
    - base_model:adapter:org/base
    - lora
    ---
    """
    base, tags = config.get("base_model_name_or_path"), ["lora"]
    lines = []
    if base:
        lines.append(f"base_model: {_scalar(base)}")
        tags.insert(0, f"base_model:adapter:{base}")
    lines.append("library_name: peft")
    if config.get("task_type") == "CAUSAL_LM":
        lines.append("pipeline_tag: text-generation")
    lines += ["tags:", *(f"- {_scalar(tag)}" for tag in tags)]
    return "\n".join(["---", *lines, "---", _USAGE.format_map(config)])


def _scalar(value: str) -> str:
    """A string for YAML: plain where YAML surely reads a string, otherwise quoted as in JSON."""
    plain = re.fullmatch(r"lora|[A-Za-z][\w.:-]*(/[\w.-]+)+", value, re.ASCII)
    return value if plain else json.dumps(value, ensure_ascii=False)
