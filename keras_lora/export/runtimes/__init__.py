"""Merged models for other runtimes."""
