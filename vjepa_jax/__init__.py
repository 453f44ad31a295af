"""Pretraining of video joint-embedding predictive models (V-JEPA) in JAX and Flax.

Importing the package touches no device: back ends start with the first computation.

    from vjepa_jax import load_encoder
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_encoder"]


def __getattr__(name: str) -> Any:
    # On first use: the package itself imports nothing heavy.
    if name == "load_encoder":
        from vjepa_jax.evals.encode import load_encoder

        return load_encoder
    raise AttributeError(f"module 'vjepa_jax' has no attribute '{name}'")
