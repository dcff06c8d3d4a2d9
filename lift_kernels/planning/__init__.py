"""What fine-tuning takes in memory, from a model's configuration alone."""

from .plan import FormPlan, MemoryPlan, plan_memory

__all__ = ["FormPlan", "MemoryPlan", "plan_memory"]
