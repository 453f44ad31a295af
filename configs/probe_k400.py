r"""Kinetics-400, 400 classes: V-JEPA's and V-JEPA 2's frozen evaluation.

8 clips of 16 frames, every fourth, tokens of all together; 3 views in tests; 20 epochs.

| variant            | published top-1 | encoder EFLOP | heads EFLOP | H100 h |
|--------------------|-----------------|---------------|-------------|--------|
| `vitl16`           | 85.1            | 65            | 1337        | 980    |
| `vith16`           | 85.3            | 128           | 1790        | 1350   |
| `vitg16`           | 86.6            | 199           | 2034        | 1570   |
| `vitg16_384`       | 87.3            | 551           | 8281        | 6200   |
| `vjepa_vitl16`     | 80.8            | 47            | 0.8         | 33     |
| `vjepa_vith16`     | 82.0            | 93            | 1.2         | 66     |
| `vjepa_vith16_384` | 81.9            | 363           | 3.5         | 260    |

V-JEPA 2.1, by its paper: ViT-g 384 87.0, ViT-G 384 87.7. Published numbers are those of
the head that is best on the test set (`official_best_on_test_accuracy` here).
Hours are estimates (docs/evaluation.md). V-JEPA's variants (`vjepa_*`) have its one
head with one block.

Command; DIR is a run (`--workdir`) or converted weights:

    python -m vjepa_jax.probe --config=configs/probe_k400.py:vitl16 --checkpoint=DIR \
        --config.data.train_path=k400_train.csv --config.data.test_path=k400_val.csv
"""

from vjepa_jax.evals import settings


def get_config(arg=""):
    """Return the config of a variant, by default V-JEPA 2's ViT-L."""
    config, _ = settings.of_paper("k400", arg)
    config.num_classes = 400
    config.data.update(num_clips=8, num_views=3)
    config.test_batch_size = 8
    config.heads_at_once = 4
    return config.lock()
