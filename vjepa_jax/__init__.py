"""Pretraining of video joint-embedding predictive models (V-JEPA) in JAX and Flax.

Importing the package touches no device: back ends start with the first computation.

    from vjepa_jax import load_encoder, load_surprise
"""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load_encoder", "load_surprise"]


def __getattr__(name: str) -> Any:
    # On first use: the package itself imports nothing heavy.
    if name == "load_encoder":
        from vjepa_jax.evals.encode import load_encoder

        return load_encoder
    if name == "load_surprise":
        from vjepa_jax.evals.physics.surprise import load_surprise

        return load_surprise
    raise AttributeError(f"module 'vjepa_jax' has no attribute '{name}'")
