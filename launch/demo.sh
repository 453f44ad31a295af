#!/usr/bin/env bash
# Render the synthetic world, pretrain a small V-JEPA on its files, probe what it learned,
# and write a page that shows it.
# Safe to interrupt and to run again: what is complete is kept, training resumes.
#   ./launch/demo.sh [--config.key=value ...]     overrides for the training config
. "$(dirname "$0")/setup.sh" "" # no extra, nor the overrides that a sourced file would get
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
python=.venv/bin/python
run=runs/demo
config=--config=configs/world_tiny.py
"$python" -m vjepa_jax.data.prepare "$config" "$@"
"$python" -m vjepa_jax.train "$config" --workdir="$run" "$@"
"$python" -m vjepa_jax.probe --config=configs/probe_world.py --workdir="$run"
"$python" -m vjepa_jax.report --workdir="$run"
