"""Adapters of other tools, both ways."""
