"""Adapters of Hugging Face PEFT meet a Keras model."""
