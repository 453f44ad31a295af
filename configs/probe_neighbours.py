r"""Nearest neighbours and few labels per class on pooled features.

k-NN by cosine with weights exp(cosine / 0.07), as is usual for self-supervised features
(arXiv 1805.01978); nearest class mean and logistic regression on 1, 5 and 10 labelled
videos per class, ten draws of each; beside an untrained encoder. Cost: the encoder once
on every video.

Command; DIR is a run (`--workdir`) or converted weights:

    python -m vjepa_jax.probe --config=configs/probe_neighbours.py --checkpoint=DIR \
        --config.data.train_path=ssv2_train.csv --config.data.test_path=ssv2_val.csv
"""

from vjepa_jax.evals import settings


def get_config():
    """Return the config; clips as the model was trained on."""
    return settings.neighbours().lock()
