r"""Probes of the synthetic world on a run's target encoder.

Motion class by linear (16 labels per class, and all) and attentive probes; R² of the
main object's state by linear and attentive read-outs: position, velocity, position
while it is occluded, and the time until it next meets something; beside a random-init
encoder and raw pixels.

Command:

    python -m vjepa_jax.probe --config=configs/probe_world.py --workdir=runs/tiny
"""

from ml_collections import ConfigDict


def get_config():
    """Return the evaluation's config."""
    config = ConfigDict()
    config.evaluation = "world"
    config.seed = 0  # of the probes and of the random-init encoder
    config.random_init = True  # probe an untrained encoder and raw pixels beside it
    config.step = -1  # checkpoint to probe; -1: the latest
    config.batch_size = 100  # clips per call of the encoder
    config.num_workers = 2  # decoding processes
    config.labels_per_class = 16  # of the few-label probe
    config.draws = 10  # few-label training sets, averaged
    config.hidden_visibility = 0.2  # an object with less to see is occluded
    config.num_heads = 3  # of the attentive probes
    config.attentive = ConfigDict()
    config.attentive.epochs = 12
    config.attentive.batch_size = 64
    config.attentive.learning_rates = (1e-3, 3e-3)
    config.attentive.weight_decay = 0.01
    config.regression = ConfigDict()  # attentive probes of state, on single time steps
    config.regression.epochs = 6
    config.regression.batch_size = 128
    config.regression.learning_rates = (3e-3, 1e-2)
    config.regression.weight_decay = 0.01
    return config.lock()
