r"""Jester, 27 classes: V-JEPA 2's frozen evaluation.

4 clips of 32 frames, every second, tokens of all together, and of four blocks of the
encoder each; 3 views in tests; 100 epochs; 3 heads.

| variant            | published top-1 | encoder EFLOP | heads EFLOP | H100 h |
|--------------------|-----------------|---------------|-------------|--------|
| `vitl16`           | 97.6            | 197           | 6199        | 4500   |
| `vith16`           | 97.7            | 377           | 7923        | 5800   |
| `vitg16`           | 97.7            | 575           | 8811        | 6600   |
| `vitg16_384`       | 97.8            | 1799          | 41637       | 30500  |
| `vjepa_vith16`     | 97.7            |               |             |        |

Published numbers are those of the head that is best on the test set
(`official_best_on_test_accuracy` here). V-JEPA 1's ViT-H was evaluated with the same
protocol, so with 4 blocks.
Hours are estimates (docs/evaluation.md).

Command; DIR is a run (`--workdir`) or converted weights:

    python -m vjepa_jax.probe --config=configs/probe_jester.py:vitl16 \
        --checkpoint=DIR --config.data.train_path=jester_train.csv \
        --config.data.test_path=jester_val.csv
"""

import pathlib
import runpy

# Config files are not a package: the file of the same protocol is loaded by its path.
_DIVING48 = runpy.run_path(str(pathlib.Path(__file__).with_name("probe_diving48.py")))


def get_config(arg=""):
    """Return the config of a variant, by default V-JEPA 2's ViT-L."""
    config = _DIVING48["get_config"](arg)
    config.name = "jester"
    config.num_classes = 27
    return config
