"""Alias: `python -m vjepa_jax.data.check` is `python -m vjepa_jax.check`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("vjepa_jax.check", run_name="__main__", alter_sys=True)
