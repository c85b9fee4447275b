"""SavedModels that a server runs without Keras and without this package."""

from keras_lora.export.adding import add_adapter_to_saved_model
from keras_lora.export.checking import GraphReport, check_saved_model
from keras_lora.export.saved_model import export_saved_model

__all__ = [
    "GraphReport",
    "add_adapter_to_saved_model",
    "check_saved_model",
    "export_saved_model",
]
