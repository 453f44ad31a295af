"""Alias: `python -m vjepa_jax.data.prepare` is `python -m vjepa_jax.prepare`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("vjepa_jax.prepare", run_name="__main__", alter_sys=True)
