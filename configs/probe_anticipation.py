r"""What will happen next in the synthetic world's play: action anticipation.

A context of 8 frames ends a third of a second (4 frames) before an object bounces off
a wall or strikes another one. The verb is which of the walls, or a strike; the noun is
the object's shape. Results of an untrained model are added (`paper_random`). Measured
numbers are in docs/anticipation.md.

The world must have been rendered with clips for it, here in a folder of its own:

    python -m vjepa_jax.prepare --config=configs/world_tiny.py \
        --config.world.path=runs/actions --config.world.action_clips=1600 ...
    python -m vjepa_jax.probe --config=configs/probe_anticipation.py --workdir=RUN \
        --config.data.videos_path=runs/actions \
        --config.data.train_path=runs/actions/actions_train_actions.csv \
        --config.data.test_path=runs/actions/actions_test_actions.csv
"""

from vjepa_jax.evals import settings


def get_config():
    """Return the config."""
    config = settings.anticipation()
    config.random_init = True
    config.epochs = 36  # after 12 the heads have hardly begun to fit
    config.batch_size = 64
    config.test_batch_size = 128
    config.num_output_frames = 4
    config.mask_index = 0
    config.head.update(depth=1, num_heads=0)
    config.grids.main.update(learning_rates=(1e-3, 3e-3, 1e-2), weight_decays=(0.01,))
    # An action lasts one frame, so that the anchors hardly differ; left and right do.
    config.data.update(anchors=("paper",), augment=False, flip_probability=0.0)
    config.data.update(num_frames=8, fps=12.0, resolution=0, anticipation_secs=1 / 3)
    return config.lock()
