r"""V-JEPA (arXiv 2404.08471): ViT-L/16 and ViT-H/16 on 16 frames.

Source: the paper's table 8 and the official configs `vitl16`, `vith16`, `vith16_384`.

| variant      | batch | clip      | updates | ZFLOP | v5p h | H100 h |
|--------------|-------|-----------|---------|-------|-------|--------|
| `vitl16`     | 3072  | 16 x 224² | 90000   | 0.70  | 1.1 k | 0.5 k  |
| `vith16`     | 3072  | 16 x 224² | 90000   | 1.29  | 1.9 k | 0.9 k  |
| `vith16_384` | 2400  | 16 x 384² | 90000   | 4.13  | 6.3 k | 2.9 k  |

`batch` is clips per update. ZFLOP (1e21 FLOPs) are those of the whole run without
recomputation. Hours are estimates for one chip at 40 % of its bf16 peak: no recipe was
run here in full.

As in the official code and the paper, schedules are 1.25 times as long as the run: the
last update has a rate of 7.5e-5 and a weight decay of 0.366. The start of a run prints
these values.

Differences from the official code:
- Token counts are static: the mean of what its trimming leaves in its batch per device
  (24; 10 at 384²).
- Crops are resized with a filter, and frame steps are exact. For the official rules:
  `--config.data.resize=official --config.data.sampling=official`.

Command (`:vitl16,smoke` is a small form of the variant, which needs no data):

    python -m vjepa_jax.train --config=configs/vjepa.py:vitl16 --workdir=DIR \
        --config.data.path=LIST_OR_FOLDER
"""

from vjepa_jax.config import smoke
from vjepa_jax.config.defaults import get_config as get_default

VARIANTS = {
    "vitl16": {},
    "vith16": {"model.encoder.size": "huge"},
    "vith16_384": {
        "model.encoder.size": "huge",
        "batch_size": 2400,
        "data.resolution": 384,
        "masks.short.group_size": 10,
        "masks.long.group_size": 10,
    },
}


def get_config(arg=""):
    """Return the config of a variant, by default ViT-L's."""
    variant, is_smoke = smoke.split_argument(arg, VARIANTS)
    config = get_default()
    config.seed = 234
    config.mesh.fsdp = 0
    config.update_from_flattened_dict(VARIANTS[variant])
    if is_smoke:
        smoke.shrink(config)
    return config.lock()
