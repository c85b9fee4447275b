"""The arithmetic of low-rank adaptation, apart from any layer."""
