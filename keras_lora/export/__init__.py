"""Models for others to run, without Keras and without this package.

The public functions are those of `keras_lora`, which loads them through `on_first_use`.
"""
