r"""Probes of the synthetic world on a run's target encoder.

Motion class by linear (16 labels per class, and all) and attentive probes; R² of the
main object's state by linear and attentive read-outs: position, velocity, position
while it is occluded, and the time until it next meets something; beside a random-init
encoder and raw pixels.

Command:

    python -m vjepa_jax.probe --config=configs/probe_world.py --workdir=runs/tiny
"""

from vjepa_jax.evals import settings


def get_config():
    """Return the evaluation's config."""
    return settings.world().lock()
