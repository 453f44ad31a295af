r"""ImageNet-1K: V-JEPA's and V-JEPA 2's frozen evaluation of images.

An image is a clip that stands still for 16 frames (`vitg16_384`: 18); one view; 20
epochs; a grid of 20 heads with warm-up, and one head as V-JEPA 1's.

| variant            | published top-1 | encoder EFLOP | heads EFLOP | H100 h |
|--------------------|-----------------|---------------|-------------|--------|
| `vitl16`           | 83.5            | 43            | 347         | 270    |
| `vith16`           | 83.8            | 84            | 516         | 420    |
| `vitg16`           | 84.6            | 131           | 613         | 520    |
| `vitg16_384`       | 85.1 (at 512²)  | 425           | 1995        | 1700   |
| `vjepa_vitl16`     | 74.8            | 31            | 0.5         | 22     |
| `vjepa_vith16`     | 75.9            | 61            | 0.8         | 43     |
| `vjepa_vith16_384` | 77.4            | 239           | 2.3         | 170    |

V-JEPA 2.1, by its paper: ViT-g 384 84.8, ViT-G 384 85.5; `--config.data.num_frames=1`
gives its embedding of images. Published numbers are those of the head that is best on
the test set (`official_best_on_test_accuracy` here). Crops are mirrored, and augmented
as videos are; the official code takes timm's policy for images.
Hours are estimates (docs/evaluation.md). V-JEPA's variants (`vjepa_*`) have its one
head with one block.

Command; DIR is a run (`--workdir`) or converted weights; the images are a list, a
folder of class folders, or of TFDS:

    python -m vjepa_jax.probe --config=configs/probe_in1k.py:vitl16 --checkpoint=DIR \
        --config.data.train_path=tfds:imagenet2012:train \
        --config.data.test_path=tfds:imagenet2012:validation
"""

from vjepa_jax.evals import settings


def get_config(arg=""):
    """Return the config of a variant, by default V-JEPA 2's ViT-L."""
    config, variant = settings.of_paper("in1k", arg)
    config.num_classes = 1000
    config.data.flip_probability = 0.5
    config.batch_size = 1024
    config.heads_at_once = 7
    one_head = settings.one_head(0.001)
    if variant.startswith("vjepa_"):
        config.grids.main = one_head
        return config.lock()
    if variant == "vitg16_384":
        config.data.num_frames = 18
    config.grids.main.update(
        learning_rates=(5e-4, 1e-3, 1.5e-3, 2e-3),
        weight_decays=(5e-4, 1e-3, 2e-3, 4e-3, 8e-3),
        start_learning_rate=2e-4,
        warmup_epochs=5,
    )
    config.grids.single = one_head
    return config.lock()
