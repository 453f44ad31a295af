r"""V-JEPA 2 (arXiv 2506.09985): ViT-L, H and g/16, pretraining and cooldown.

Source: the official configs `train/vit*16/{pretrain-256px-16f,cooldown-*}`.

| variant               | batch | clip      | updates | ZFLOP | v5p h  | H100 h |
|-----------------------|-------|-----------|---------|-------|--------|--------|
| `vitl16`              | 3072  | 16 x 256² | 240000  | 2.59  | 3.9 k  | 1.8 k  |
| `vith16`              | 3072  | 16 x 256² | 240000  | 4.73  | 7.2 k  | 3.3 k  |
| `vitg16`              | 3072  | 16 x 256² | 240000  | 7.15  | 10.8 k | 5.0 k  |
| `vitl16_cooldown`     | 3072  | 64 x 256² | 12000   | 0.89  | 1.4 k  | 0.6 k  |
| `vith16_cooldown`     | 3072  | 64 x 256² | 12000   | 1.49  | 2.3 k  | 1.0 k  |
| `vitg16_cooldown`     | 3072  | 64 x 256² | 12000   | 2.28  | 3.4 k  | 1.6 k  |
| `vitg16_cooldown_384` | 3072  | 64 x 384² | 12000   | 7.80  | 11.8 k | 5.5 k  |

`batch` is clips per update. ZFLOP (1e21 FLOPs) are those of the whole run without
recomputation. Hours are estimates for one chip at 40 % of its bf16 peak: no recipe was
run here in full.

Differences from the official code:
- Token counts are static: the mean of what its trimming leaves in its batch per device
  (24; in the cooldown 12, for ViT-g 6).
- Frames are chosen by exact time and resized with a filter. For the official rules:
  `--config.data.sampling=official --config.data.resize=official`.
- The predictor has 10 mask tokens, like the released weights (the config files have 6);
  one is used.
- The numbers of updates are the paper's. The config files of ViT-L and H (3000 updates)
  and of the cooldown of ViT-g at 256² (120) hold outdated values.

Differences from the paper:
- Its images are left out.
- As in the code, cooldown schedules are 1.25 times as long as the run, so that the last
  rate is 1.06e-4. For the paper's 1e-6: `--config.optim.schedule_scale=1.0`.

Command (a cooldown starts from a pretraining run, `--config.init.path=WORKDIR`;
`:vitl16,smoke` is a small form of the variant, which needs no data):

    python -m vjepa_jax.train --config=configs/vjepa2.py:vitl16 --workdir=DIR \
        --config.data.path=k710.csv,ssv2.csv,howto100m.csv \
        --config.data.mix_weights=0.335,0.1,0.565
"""

from vjepa_jax.config import smoke
from vjepa_jax.config.defaults import get_config as get_default

SIZES = {"vitl16": "large", "vith16": "huge", "vitg16": "giant"}
VARIANTS = (*SIZES, *(f"{name}_cooldown" for name in SIZES), "vitg16_cooldown_384")


def get_config(arg=""):
    """Return the config of a variant, by default ViT-L's pretraining."""
    variant, is_smoke = smoke.split_argument(arg, VARIANTS)
    name, _, stage = variant.partition("_")
    config = get_default()
    config.seed = 239
    config.total_steps = 240_000
    config.mesh.fsdp = 0

    config.data.frame_step = 0
    config.data.fps = 4.0
    config.data.resolution = 256

    config.model.pos_embed = "rope_tiled"
    config.model.scale_init = True
    config.model.encoder.size = SIZES[name]
    config.model.predictor.num_heads = 12
    config.model.predictor.num_mask_tokens = 10
    config.model.predictor.mask_token_per = "stream"

    config.optim.start_learning_rate = 1e-4
    config.optim.learning_rate = 5.25e-4
    config.optim.final_learning_rate = 5.25e-4  # constant after the warm-up
    config.optim.final_weight_decay = 0.04
    config.optim.clip_norm = 0.0
    config.ema.start = config.ema.end = 0.99925

    if stage:
        config.total_steps = 12_000
        config.init.is_required = True
        config.data.num_frames = 64
        config.data.resolution = 384 if stage.endswith("384") else 256
        for masks in config.masks.values():
            masks.group_size = 6 if name == "vitg16" else 12
        config.optim.schedule = "linear"
        config.optim.final_learning_rate = 1e-6
        config.optim.warmup_steps = 0
    if is_smoke:
        smoke.shrink(config)
    return config.lock()
