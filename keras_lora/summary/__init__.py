"""The cost of an adapted model, and a table of its adapters."""

from keras_lora.summary.cost import (
    Cost,
    LoRASummary,
    lora_summary,
    print_trainable_parameters,
    shown_bytes,
)
from keras_lora.summary.paths import PathCell, joined, template
from keras_lora.summary.table import SummaryRow

__all__ = [
    "Cost",
    "LoRASummary",
    "PathCell",
    "SummaryRow",
    "joined",
    "lora_summary",
    "print_trainable_parameters",
    "shown_bytes",
    "template",
]
