"""Sizes of the tiny backbones, which tests may set to those of a tokenizer."""

VOCAB = 19
LENGTH = 7
