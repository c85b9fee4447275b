"""The files of Hugging Face PEFT, apart from any model: read and written without PEFT or torch.

A directory has `adapter_config.json`, `adapter_model.safetensors` and a model card. Matrices stay
in PyTorch's orientation, and modules keep the names that the Hugging Face model gives them.
"""

from keras_lora.exchange.peft_files.reading import PeftAdapter, read_peft_adapter
from keras_lora.exchange.peft_files.tensors import PeftModule
from keras_lora.exchange.peft_files.token_rows import PeftTokens
from keras_lora.exchange.peft_files.writing import write_peft_adapter

__all__ = ["PeftAdapter", "PeftModule", "PeftTokens", "read_peft_adapter", "write_peft_adapter"]
