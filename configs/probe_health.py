r"""Spread of features: standard deviation, effective rank, alignment.

On up to 2048 videos, for single tokens and for pooled clips, beside an untrained
encoder; labels are not used. Cost: the encoder twice on every video.

Command; DIR is a run (`--workdir`) or converted weights:

    python -m vjepa_jax.probe --config=configs/probe_health.py --checkpoint=DIR \
        --config.data.test_path=videos/
"""

from vjepa_jax.evals import settings


def get_config():
    """Return the config; clips as the model was trained on."""
    return settings.health().lock()
