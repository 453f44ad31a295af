r"""Something-Something v2, 174 classes: V-JEPA's and V-JEPA 2's frozen evaluation.

2 clips of 16 frames, every fourth (`vitg16_384`: 64 frames, every second), tokens of
both together; 3 views in tests; 20 epochs.

| variant            | published top-1 | encoder EFLOP | heads EFLOP | H100 h |
|--------------------|-----------------|---------------|-------------|--------|
| `vitl16`           | 73.7            | 11            | 109         | 84     |
| `vith16`           | 74.0            | 23            | 157         | 130    |
| `vitg16`           | 75.3            | 35            | 184         | 150    |
| `vitg16_384`       | 77.3            | 786           | 5822        | 4600   |
| `vjepa_vitl16`     | 69.5            | 8             | 0.1         | 6      |
| `vjepa_vith16`     | 71.4            | 16            | 0.2         | 12     |
| `vjepa_vith16_384` | 72.2            | 64            | 0.6         | 45     |

V-JEPA 2.1, by its paper: ViT-g 384 76.9, ViT-G 384 77.7. Published numbers are those of
the head that is best on the test set (`official_best_on_test_accuracy` here).
Hours are estimates (docs/evaluation.md). V-JEPA's variants (`vjepa_*`) have its one
head with one block.

Command; DIR is a run (`--workdir`) or converted weights:

    python -m vjepa_jax.probe --config=configs/probe_ssv2.py:vitl16 --checkpoint=DIR \
        --config.data.train_path=ssv2_train.csv --config.data.test_path=ssv2_val.csv
"""

from vjepa_jax.evals import settings


def get_config(arg=""):
    """Return the config of a variant, by default V-JEPA 2's ViT-L."""
    config, variant = settings.of_paper("ssv2", arg)
    config.num_classes = 174
    config.data.update(num_clips=2, num_views=3)
    if variant == "vitg16_384":
        config.data.update(num_frames=64, frame_step=2)
        config.clips_per_call = 8  # of 28 MB each
    config.test_batch_size = 16
    config.heads_at_once = 4
    return config.lock()
