r"""Video object segmentation on DAVIS 2017 by label propagation; nothing is trained.

The first frame's masks are carried on by the similarity of frozen features: from the
first frame and the 15 last ones, within 12 tokens, the 5 most similar places, weights
exp(cosine / 0.2), frames of 480 pixels on the short side (V-JEPA 2.1's protocol). See
docs/segmentation.md for the folders, and for what is not published about the protocol.
Variants: `davis`, and `world` for a world with `world.segmentation_videos`.

Published J&F, of V-JEPA 2.1's paper:

    V-JEPA 2 ViT-g        52.5
    V-JEPA 2.1 ViT-g 384  68.1
    V-JEPA 2.1 ViT-G 384  69.0
    DINOv3 7B             71.1

Cost: the encoder once on every frame of the split, 2000 frames of 480 x 848 pixels in
30 videos of `val`; J and F on the host. Neither data nor weights were at hand here.

Commands; DIR is a run (`--workdir`) or converted weights:

    python -m vjepa_jax.probe --config=configs/probe_davis.py --checkpoint=DIR \
        --config.path=DAVIS
    python -m vjepa_jax.probe --config=configs/probe_davis.py:world --workdir=runs/mine
"""

from vjepa_jax.evals import settings


def get_config(dataset="davis"):
    """Return the evaluation's config for a data set."""
    settings.require_variant(dataset, ("davis", "world"))
    config = settings.video_objects()
    config.name = f"video_objects_{dataset}"
    if dataset == "world":
        # Patches are a quarter of the 32 pixels of a frame: enlarged, they are finer.
        # Chosen on 30 videos of `2017/train`, as docs/segmentation.md says.
        config.resolution = 128
        config.last_frames = 7
        config.radius = 6.0
        config.num_workers = 2
    return config.lock()
