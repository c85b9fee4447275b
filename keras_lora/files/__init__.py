"""Adapters in files of their own."""
