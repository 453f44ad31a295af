r"""COIN, 180 tasks: V-JEPA 2's frozen evaluation.

8 clips of 16 frames, every fourth, tokens of all together, as in the official files
(the paper says 32 frames: `--config.data.num_frames=32`); 3 views in tests; 20 epochs.

| variant            | published top-1 | encoder EFLOP | heads EFLOP | H100 h |
|--------------------|-----------------|---------------|-------------|--------|
| `vitl16`           | 86.8            | 2.5           | 51          | 37     |
| `vith16`           | 87.9            | 5             | 68          | 51     |
| `vitg16`           | 90.7            | 8             | 77          | 59     |
| `vitg16_384`       | 91.1            | 21            | 313         | 240    |

V-JEPA 1's ViT-H has 87.1 by this protocol. Published numbers are those of the head that
is best on the test set (`official_best_on_test_accuracy` here).
Hours are estimates (docs/evaluation.md). V-JEPA's variants (`vjepa_*`) have its one
head with one block.

Command; DIR is a run (`--workdir`) or converted weights:

    python -m vjepa_jax.probe --config=configs/probe_coin.py:vitl16 --checkpoint=DIR \
        --config.data.train_path=coin_train.csv --config.data.test_path=coin_test.csv
"""

from vjepa_jax.evals import settings


def get_config(arg=""):
    """Return the config of a variant, by default V-JEPA 2's ViT-L."""
    config, _ = settings.of_paper("coin", arg)
    config.num_classes = 180
    config.data.update(num_clips=8, num_views=3)
    config.batch_size = 128
    config.test_batch_size = 8
    config.heads_at_once = 4
    return config.lock()
