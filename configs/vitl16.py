r"""V-JEPA ViT-L/16 at 16x224 (arXiv 2404.08471, table 8).

The defaults are this recipe: 90k updates of 3072 clips, frame step 4, masks of 8 blocks
of 15 % and 2 of 70 %. Differences from the official config: token budgets are static,
the mean of what its trimming leaves; gradients are clipped from the first step, not
only after the warm-up. 2.5 TFLOP per clip, 7e20 FLOP in all. Not run here in full.

Command:

    python -m vjepa_jax.train --config=configs/vitl16.py --workdir=DIR \
        --config.data.path=LIST_OR_FOLDER
"""

from vjepa_jax.default_config import get_config as get_default


def get_config():
    """Return V-JEPA's config for ViT-L/16."""
    return get_default()
