"""Videos whose class is a colour, and an untrained encoder that looks at them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import video_files

from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.parallel import sharding

CLASSES = 3
SIDE = 16  # of the clips in pixels


def write_videos(folder, name, count):
    """Write videos of the classes in turn and return their list, `NAME.csv`."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        label = i % CLASSES
        frames = rng.integers(0, 60, (12, 32, 48, 3), dtype=np.uint8)
        frames[..., label] += 150
        path = video_files.write_video(folder / f"{name}{i}.mp4", frames)
        lines.append(f"{path} {label}\n")
    (folder / f"{name}.csv").write_text("".join(lines))
    return str(folder / f"{name}.csv")


def make_frozen(depth):
    """Make a model without a predictor, of 16 channels and 16 tokens a clip."""
    encoder = VideoEncoder(depth, width=16, num_heads=2, mlp_dim=32, patch_size=8)
    shape = (4, SIDE, SIDE, 3)
    init = jax.jit(encoder.init)
    params = nn.unbox(init(jax.random.key(0), jnp.zeros((1, *shape))))
    mesh = sharding.make_mesh()
    return FrozenModel(encoder, None, {"target": params["params"]}, None, shape, mesh)
