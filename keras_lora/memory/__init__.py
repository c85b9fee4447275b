"""The memory of a training step, before anything runs."""

from keras_lora.memory.plan import MemoryPlan, MemoryRow, memory_plan

__all__ = ["MemoryPlan", "MemoryRow", "memory_plan"]
