"""Pretraining of video joint-embedding predictive models (V-JEPA) in JAX and Flax.

Importing the package touches no device: back ends start with the first computation.
"""

__version__ = "0.1.0"
