r"""V-JEPA 2.1 (arXiv 2603.14482): ViT-B, L, g and G/16 on videos and images.

Source: the official configs `train_2_1/vit*16/{pretrain-256px-16f,cooldown-256px-64f}`;
for the distilled ViT-B and L, the paper's appendix and the released weights, since the
official trainer of these is not public.

| variant           | batch       | clip      | updates | ZFLOP | v5p h  | H100 h |
|-------------------|-------------|-----------|---------|-------|--------|--------|
| `vitb16`          | 3072 + 4608 | 16 x 256² | 135000  | 4.68  | 7.1 k  | 3.3 k  |
| `vitl16`          | 3072 + 4608 | 16 x 256² | 135000  | 5.05  | 7.6 k  | 3.5 k  |
| `vitg16`          | 3072 + 4608 | 16 x 256² | 135000  | 4.63  | 7.0 k  | 3.3 k  |
| `vitG16`          | 3072 + 4608 | 16 x 256² | 135000  | 8.17  | 12.4 k | 5.7 k  |
| `vitb16_cooldown` | 3072 + 9216 | 64 x 256² | 12000   | 2.29  | 3.5 k  | 1.6 k  |
| `vitl16_cooldown` | 3072 + 9216 | 64 x 256² | 12000   | 2.44  | 3.7 k  | 1.7 k  |
| `vitg16_cooldown` | 3072 + 9216 | 64 x 256² | 12000   | 2.35  | 3.6 k  | 1.7 k  |
| `vitG16_cooldown` | 3072 + 9216 | 64 x 256² | 12000   | 3.66  | 5.5 k  | 2.6 k  |

Every update uses a stream of videos and one of images (`image`), with equal weights.
`batch` is clips per update. ZFLOP (1e21 FLOPs) are those of the whole run without
recomputation. Hours are estimates for one chip at 40 % of its bf16 peak: no recipe was
run here in full.

ViT-g and G predict four levels of their own moving average with a predictor of 24
blocks. ViT-B and L learn from a frozen ViT-G (`teacher.path`, any run or converted
checkpoint of `vitG16`): they predict its last level with a predictor of 12 blocks.
Three of their four norms are then not trained, as in the released weights.

Differences from the official code:
- Every device computes videos and images in one update; there one part of the devices
  computes videos and the other images.
- Token counts are static: the mean of what its trimming leaves in its batch per device.
  Those of the cooldown (24 videos, 72 images) are a guess from the totals.
- Frames are chosen by exact time and resized with a filter (`data.sampling`,
  `data.resize`).
- The number of updates is the paper's 135 000 (the config files have 300 000).

Differences from the paper:
- It has 128 clips and 2304 images per update, a peak rate of 5.25e-4, not 6e-4, and a
  context weight of 0.7 for images.
- Its cooldown uses clips of 64 x 384² and images of 512²:
  `--config.data.resolution=384 --config.streams.image.resolution=512`.
- As in the code, cooldown schedules are 1.25 times as long as the run, so that the last
  rate is 1.21e-4. For the paper's 1e-6: `--config.optim.schedule_scale=1.0`.

Command (ViT-B and L need `--config.teacher.path=RUN`, a cooldown also the pretraining
run, `--config.init.path=WORKDIR`; `:vitg16,smoke` is a small form of the variant, which
needs no data, run or teacher):

    python -m vjepa_jax.train --config=configs/vjepa2_1.py:vitg16 --workdir=DIR \
        --config.data.path=VIDEOS --config.streams.image.path=IMAGES

Both paths may be folders, lists, shards or TFDS datasets, or several of them with
weights (`data.mix_weights`, `streams.image.mix_weights`).
"""

from ml_collections import ConfigDict

from vjepa_jax.config import smoke
from vjepa_jax.config.defaults import get_config as get_default
from vjepa_jax.config.defaults import mask, stream

# Size, supervised blocks, and the official batch per device of videos and of images.
SIZES = {
    "vitb16": ("base", (2, 5, 8, 11), 96, 144),
    "vitl16": ("large", (5, 11, 17, 23), 48, 72),
    "vitg16": ("giant", (9, 19, 29, 39), 48, 72),
    "vitG16": ("gigantic", (11, 23, 37, 47), 24, 36),
}
VARIANTS = (*SIZES, *(f"{name}_cooldown" for name in SIZES))
_DISTILLED = ("vitb16", "vitl16")
_TEACHER_WIDTH = 1664  # of ViT-G


def get_config(arg=""):
    """Return the config of a variant, by default ViT-B's distillation."""
    variant, is_smoke = smoke.split_argument(arg, VARIANTS)
    name, _, stage = variant.partition("_")
    size, levels, videos, images = SIZES[name]
    if stage:
        videos, images = 24, 72
    config = get_default()
    config.seed = 239
    config.total_steps = 135_000
    config.mesh.fsdp = 0

    config.data.frame_step = 0
    config.data.fps = 4.0
    config.data.resolution = 256
    for masks in config.masks.values():
        masks.group_size = videos
    with config.unlocked():
        config.streams.image = stream(
            batch_size=9216 if stage else 4608,
            num_frames=1,
            frame_step=1,
            resolution=256,
            masks=ConfigDict({"image": mask(num_blocks=10, group_size=images)}),
        )

    config.model.pos_embed = "rope"
    config.model.base_grid = (1, 16, 16)
    config.model.scale_init = True
    config.model.image_embed = True
    config.model.encoder.size = size
    config.model.encoder.levels = levels
    config.model.predictor.num_heads = 12
    config.model.predictor.num_mask_tokens = 8
    config.model.predictor.mask_token_per = "run"
    config.model.predictor.predict_context = True
    if name in _DISTILLED:
        config.teacher.is_required = True
        config.teacher.output_levels = 1
        config.model.encoder.output_levels = 1
        config.model.predictor.out_dim = _TEACHER_WIDTH
    else:
        config.model.predictor.depth = 24
        config.model.predictor.deep_input = True

    config.objective.context_weight = 0.5
    config.objective.context_warmup = (15_000, 30_000)
    config.optim.start_learning_rate = 1e-4
    config.optim.learning_rate = 6e-4
    config.optim.final_learning_rate = 6e-4  # constant after the warm-up
    config.optim.final_weight_decay = 0.04
    config.optim.clip_norm = 0.0
    config.ema.start = config.ema.end = 0.99925

    if stage:
        config.total_steps = 12_000
        config.init.is_required = True
        config.data.num_frames = 64
        config.objective.context_warmup = (0, 0)
        config.objective.context_distance = False
        config.optim.schedule = "linear"
        config.optim.final_learning_rate = 1e-6
        config.optim.warmup_steps = 0
    if is_smoke:
        smoke.shrink(config)
    return config.lock()
