r"""Intuitive physics by violation of expectation; no probe is trained.

In windows of a video the features of what comes after the first frames are predicted
from these; of a possible and an impossible video the latter should surprise more. The
variant is the data: `world`, `intphys`, `grasp`, `inflevel`. See docs/physics.md for
their folders.

Commands:

    python -m vjepa_jax.probe --config=configs/probe_physics.py --workdir=runs/tiny
    python -m vjepa_jax.probe --config=configs/probe_physics.py:intphys \
        --checkpoint=converted/vit_h --config.path=IntPhys/dev

Protocol of Garrido et al., "Intuitive physics understanding emerges from
self-supervised pretraining on natural videos" (2025), with the defaults of its code:

    data       window  contexts          step  stride  videos
    intphys    16      2,4,6,8,10        2     2       dev: 30 quadruplets each of O1-O3
    grasp      16      2,4,6,8,10        10    2       16 properties, 2048 pairs
    inflevel   32      4,8,12,16,20      5     2       2748 pairs of 3 properties

The paper searches further: steps 2, 5, 10 (InfLevel 5, 10, 20), windows 16 and 32, and
reports the best per model and property. Its numbers, pairwise, in percent:

                       intphys  grasp  inflevel
    V-JEPA ViT-H       98       66     62        (weights not released)
    untrained          50-55    54-58  52
    V-JEPA 2 ViT-H     83-89                    (a third party; windows 16 and 32)

The columns without a context in their name are those of `reported_context`; which one
was best on the data itself is only in `best_accuracy`.
"""

from ml_collections import ConfigDict


def get_config(dataset="world"):
    """Return the evaluation's config for a data set."""
    config = ConfigDict()
    config.evaluation = "physics"
    config.name = f"physics_{dataset}"  # of the file of results
    config.dataset = dataset
    config.path = ""  # folder of the videos; "": the run's world
    config.lists = ""  # folder of InfLevel's PROPERTY.csv; "": that of the videos
    config.seed = 0  # of the untrained networks
    config.null_seeds = 10  # untrained networks; 0: none
    config.step = -1  # checkpoint to judge; -1: the latest
    config.batch_size = 32  # windows per call
    config.groups_at_once = 32  # pairs or quadruplets in memory
    config.num_workers = 4  # decoding threads
    config.resolution = 0  # side of the frames in pixels; 0: the run's
    config.num_frames = 16  # of a window; 0: the run's
    config.stride = 2  # frames from one window to the next
    config.frame_step = 2  # one frame of the video in so many is kept
    config.max_frames = 0  # of the video; 0: all
    config.context_frames = (2, 4, 6, 8, 10)  # of a window, from which it is predicted
    # Which context's results are reported; 0: the smallest surprise of all.
    config.reported_context = 8
    config.mask_index = 0  # of the predictor's mask tokens
    if dataset == "world":
        config.num_frames, config.frame_step, config.context_frames = 12, 1, (8,)
        config.batch_size, config.groups_at_once = 64, 512
    elif dataset == "intphys":
        config.max_frames = 99
        config.reported_context = 0
    elif dataset == "grasp":
        config.frame_step = 10
    elif dataset == "inflevel":
        config.num_frames, config.frame_step = 32, 5
        config.context_frames, config.reported_context = (4, 8, 12, 16, 20), 16
    return config.lock()
