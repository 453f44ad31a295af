r"""Intuitive physics by violation of expectation; no probe is trained.

In windows of a video the features of what comes after the first frames are predicted
from these; of a possible and an impossible video the latter should surprise more. The
variant is the data: `world`, `intphys`, `intphys2`, `grasp`, `inflevel`. See
docs/physics.md for their folders.

Commands:

    python -m vjepa_jax.probe --config=configs/probe_physics.py --workdir=runs/tiny
    python -m vjepa_jax.probe --config=configs/probe_physics.py:intphys \
        --checkpoint=converted/vit_h --config.path=IntPhys/dev

Protocol of Garrido et al., "Intuitive physics understanding emerges from
self-supervised pretraining on natural videos" (2025), with the defaults of its code:

    data       window  contexts          step  stride  videos
    intphys    16      2,4,6,8,10        2     2       dev: 30 quadruplets each of O1-O3
    grasp      16      2,4,6,8,10        10    2       16 properties, 2048 pairs
    intphys2   16      4,6,8,10,12,14    10    2       Main: 506 pairs of 4 conditions
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

from vjepa_jax.evals import settings


def get_config(dataset="world"):
    """Return the evaluation's config for a data set."""
    return settings.physics(dataset).lock()
