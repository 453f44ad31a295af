"""Flax Linen modules of the V-JEPA family; they take fields, never a run's config."""
