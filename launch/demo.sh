#!/usr/bin/env bash
# Render the synthetic world, pretrain a small V-JEPA on it with evaluations during
# training, probe the result, and write a report page.
# Safe to interrupt and to run again: complete parts are kept, training resumes.
#   ./launch/demo.sh [--config.key=value ...]     overrides for the training config
. "$(dirname "$0")/setup.sh" report
export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
python=.venv/bin/python
run=runs/demo
config=--config=configs/world_tiny.py
"$python" -m vjepa_jax.prepare "$config" "$@"
"$python" -m vjepa_jax.train "$config" --workdir="$run" \
  --config.evals.health.every_steps=1000 --config.evals.health.overrides=num_videos=512 \
  --config.evals.physics.every_steps=1000 "$@"
for evaluation in world physics; do
  "$python" -m vjepa_jax.probe --config="configs/probe_$evaluation.py" --workdir="$run"
done
"$python" -m vjepa_jax.report --workdir="$run"
