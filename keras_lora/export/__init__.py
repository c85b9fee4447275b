"""Models for others to run, without Keras and without this package."""

from keras_lora.export.checking import GraphReport, check_saved_model
from keras_lora.export.many.adding import add_adapter_to_saved_model
from keras_lora.export.runtimes.conversion import RuntimeReport
from keras_lora.export.runtimes.litert import export_litert
from keras_lora.export.runtimes.onnx import export_onnx
from keras_lora.export.saved_model import export_saved_model

__all__ = [
    "GraphReport",
    "RuntimeReport",
    "add_adapter_to_saved_model",
    "check_saved_model",
    "export_litert",
    "export_onnx",
    "export_saved_model",
]
