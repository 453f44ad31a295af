r"""Semantic segmentation by a linear probe of frozen features, patch by patch.

Variants are the data: `ade20k`, `cityscapes`, `voc`, and `world` for the synthetic
world rendered with `world.segmentation_videos`. See docs/segmentation.md for the lists.

Published mIoU, of V-JEPA 2.1's paper, whose training of the probe is not published:

                          ade20k  cityscapes  voc
    V-JEPA 2 ViT-g        24.4    45.9        63.9
    V-JEPA 2.1 ViT-g 384  47.8    71.8        84.7
    V-JEPA 2.1 ViT-G 384  47.9    73.5        85.0
    DINOv3 7B             55.9    81.1        86.6

Cost: the encoder on every image of every epoch, and heads that cost little beside it.
Neither data nor weights were at hand here: no published number is reproduced.

Commands; DIR is a run (`--workdir`) or converted weights:

    python -m vjepa_jax.probe --config=configs/probe_segmentation.py:ade20k \
        --checkpoint=DIR --config.data.train_path=ade_train.txt \
        --config.data.test_path=ade_val.txt
    python -m vjepa_jax.probe --config=configs/probe_segmentation.py:world \
        --workdir=runs/mine
"""

from vjepa_jax.evals import settings
from vjepa_jax.world.labelled import NUM_CLASSES

_CLASSES = {"ade20k": 150, "cityscapes": 19, "voc": 21, "world": NUM_CLASSES}


def get_config(dataset="ade20k"):
    """Return the evaluation's config for a data set."""
    settings.require_variant(dataset, _CLASSES)
    config = settings.segmentation()
    config.name = f"segmentation_{dataset}"
    config.num_classes = _CLASSES[dataset]
    if dataset == "ade20k":
        config.data.first_class = 1  # 0 is what has no class
    elif dataset == "cityscapes":
        config.data.size = (512, 1024)
    elif dataset == "world":
        # Patches are a quarter of the 32 pixels of a frame: enlarged, they are finer.
        config.data.size = (128, 128)
        config.data.max_images = 800
        config.data.num_workers = 2
        config.epochs = 6
        config.grids.main.learning_rates = (1e-1, 3e-2, 1e-2, 3e-3)
    return config.lock()
