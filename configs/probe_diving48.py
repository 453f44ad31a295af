r"""Diving48, 48 classes: V-JEPA 2's frozen evaluation.

4 clips of 32 frames, every second, tokens of all together, and of four blocks of the
encoder each; 3 views in tests; 100 epochs; 3 heads.

| variant            | published top-1 | encoder EFLOP | heads EFLOP | H100 h |
|--------------------|-----------------|---------------|-------------|--------|
| `vitl16`           | 89.0            | 25            | 784         | 570    |
| `vith16`           | 89.8            | 48            | 1002        | 740    |
| `vitg16`           | 90.1            | 73            | 1114        | 830    |
| `vitg16_384`       | 90.2            | 228           | 5267        | 3900   |
| `vjepa_vith16`     | 87.9            |               |             |        |

V-JEPA 2.1, by its paper: ViT-g 384 89.0, ViT-G 384 89.2. Published numbers are those of
the head that is best on the test set (`official_best_on_test_accuracy` here). V-JEPA
1's ViT-H was evaluated with the same protocol, so with 4 blocks.
Hours are estimates (docs/evaluation.md).

Command; DIR is a run (`--workdir`) or converted weights:

    python -m vjepa_jax.probe --config=configs/probe_diving48.py:vitl16 \
        --checkpoint=DIR --config.data.train_path=diving48_train.csv \
        --config.data.test_path=diving48_test.csv
"""

from vjepa_jax.evals import settings

LAYERS = {
    "vitl16": (17, 19, 21, 23),
    "vith16": (25, 27, 29, 31),
    "vitg16": (24, 29, 34, 39),
}


def get_config(arg=""):
    """Return the config of a variant, by default V-JEPA 2's ViT-L."""
    config, variant = settings.of_paper("diving48", arg)
    config.num_classes = 48
    config.out_layers = LAYERS[variant.removeprefix("vjepa_").removesuffix("_384")]
    config.data.update(num_frames=32, frame_step=2, num_clips=4, num_views=3)
    config.epochs = 100
    config.batch_size = 128
    config.test_batch_size = 8
    config.clips_per_call = 32
    config.clip_norm = 0.0
    config.head.update(depth=4, num_heads=16)
    config.heads_at_once = 1
    config.grids.main = settings.grid()
    config.grids.main.update(learning_rates=(1e-3, 3e-4, 1e-4), weight_decays=(0.8,))
    return config.lock()
