"""Flax Linen modules of the V-JEPA family; they take explicit fields, never a config."""
