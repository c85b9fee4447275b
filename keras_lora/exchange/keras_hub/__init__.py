"""Adapters of KerasHub's own `.lora.h5` files."""
