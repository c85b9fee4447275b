"""Logits in chunks of tokens: a causal language model that trains without whole logits."""

from keras_lora.chunks.chunking import chunk_logits, chunked_tokens, unchunk_logits

__all__ = ["chunk_logits", "chunked_tokens", "unchunk_logits"]
