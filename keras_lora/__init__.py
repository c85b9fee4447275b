"""LoRA for Keras 3: adapt, `fit`, merge, serve.

The exports import TensorFlow, so each of them is loaded on first use (`export/on_first_use.py`).
"""

from typing import TYPE_CHECKING, Any

import keras_lora.as_command  # noqa: F401  (before TensorFlow is imported)
from keras_lora.adapters import (
    delete_adapter,
    disable_adapter,
    scale_adapter,
    set_adapter,
    use_adapter,
)
from keras_lora.checks import AdapterFileError
from keras_lora.chunks import chunk_logits, unchunk_logits
from keras_lora.combining import combine_adapters
from keras_lora.config import AdapterSpec, LoRAConfig
from keras_lora.exchange.keras_hub.adapter import load_keras_hub_lora, save_keras_hub_lora
from keras_lora.exchange.keras_hub.converted import ConvertedLayer
from keras_lora.exchange.peft.loading import load_peft_adapter
from keras_lora.exchange.peft.saving import save_peft_adapter
from keras_lora.export import on_first_use
from keras_lora.export.reports import GraphReport, RuntimeReport
from keras_lora.files.adapter_files import read_adapter_config, read_adapter_files
from keras_lora.files.saving import load_adapter, save_adapter
from keras_lora.inject import (
    apply_lora,
    guard_keras_savers,
    merge_lora,
    merged,
    rematerialize,
    unload_lora,
    unrematerialize,
)
from keras_lora.layers import (
    Drift,
    LoRAConv1D,
    LoRAConv1DTranspose,
    LoRAConv2D,
    LoRAConv2DTranspose,
    LoRAConv3D,
    LoRAConv3DTranspose,
    LoRAConvLSTMCell,
    LoRADense,
    LoRADepthwiseConv1D,
    LoRADepthwiseConv2D,
    LoRAEinsumDense,
    LoRAEmbedding,
    LoRAGRUCell,
    LoRALayer,
    LoRALSTMCell,
    LoRAReversibleEmbedding,
    LoRASeparableConv1D,
    LoRASeparableConv2D,
    LoRASimpleRNNCell,
    register_lora_class,
)
from keras_lora.memory import MemoryPlan, MemoryRow, memory_plan
from keras_lora.ranks import (
    RankReport,
    ShrinkReport,
    allocate_ranks,
    rank_report,
    shrink_adapter,
)
from keras_lora.rates import LoRAPlus, set_rates
from keras_lora.summary import LoRASummary, lora_summary, print_trainable_parameters
from keras_lora.training.checkpoint import AdapterCheckpoint
from keras_lora.training.learning_rate import RateReport, RateTrial, suggest_learning_rate
from keras_lora.training.rank_schedule import RankSchedule, RankTrial
from keras_lora.version import __version__
from keras_lora.walker import Target, find_targets, lora_layers

if TYPE_CHECKING:
    from keras_lora.export.checking import check_saved_model
    from keras_lora.export.many.adding import add_adapter_to_saved_model
    from keras_lora.export.runtimes.litert import export_litert
    from keras_lora.export.runtimes.onnx import export_onnx
    from keras_lora.export.saved_model import export_saved_model

__all__ = [
    "AdapterCheckpoint",
    "AdapterFileError",
    "AdapterSpec",
    "ConvertedLayer",
    "Drift",
    "GraphReport",
    "LoRAConfig",
    "LoRAConv1D",
    "LoRAConv1DTranspose",
    "LoRAConv2D",
    "LoRAConv2DTranspose",
    "LoRAConv3D",
    "LoRAConv3DTranspose",
    "LoRAConvLSTMCell",
    "LoRADense",
    "LoRADepthwiseConv1D",
    "LoRADepthwiseConv2D",
    "LoRAEinsumDense",
    "LoRAEmbedding",
    "LoRAGRUCell",
    "LoRALSTMCell",
    "LoRALayer",
    "LoRAPlus",
    "LoRAReversibleEmbedding",
    "LoRASeparableConv1D",
    "LoRASeparableConv2D",
    "LoRASimpleRNNCell",
    "LoRASummary",
    "MemoryPlan",
    "MemoryRow",
    "RankReport",
    "RankSchedule",
    "RankTrial",
    "RateReport",
    "RateTrial",
    "RuntimeReport",
    "ShrinkReport",
    "Target",
    "__version__",
    "add_adapter_to_saved_model",
    "allocate_ranks",
    "apply_lora",
    "check_saved_model",
    "chunk_logits",
    "combine_adapters",
    "delete_adapter",
    "disable_adapter",
    "export_litert",
    "export_onnx",
    "export_saved_model",
    "find_targets",
    "load_adapter",
    "load_keras_hub_lora",
    "load_peft_adapter",
    "lora_layers",
    "lora_summary",
    "memory_plan",
    "merge_lora",
    "merged",
    "print_trainable_parameters",
    "rank_report",
    "read_adapter_config",
    "read_adapter_files",
    "register_lora_class",
    "rematerialize",
    "save_adapter",
    "save_keras_hub_lora",
    "save_peft_adapter",
    "scale_adapter",
    "set_adapter",
    "set_rates",
    "shrink_adapter",
    "suggest_learning_rate",
    "unchunk_logits",
    "unload_lora",
    "unrematerialize",
    "use_adapter",
]

guard_keras_savers()


def __getattr__(name: str) -> Any:
    if name not in on_first_use.MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = on_first_use.load(name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
