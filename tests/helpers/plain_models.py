"""The models again in plain double-precision NumPy, one sample at a time."""

import itertools
import math

import jax
import numpy as np

GRID = (2, 3, 4)
HEADS = 2


def plain_norm(x, params):
    centred = x - x.mean(-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
    return x * params["scale"] + params["bias"]


def plain_linear(x, params):
    return x @ params["kernel"] + params["bias"]


def plain_rope(x, idx, grid):
    """Rotate one head [N, head_dim], channel pair by channel pair."""
    x = x.copy()
    head_dim = x.shape[-1]
    per_axis = 2 * (head_dim // 3 // 2)
    for row, number in zip(x, idx, strict=True):
        for axis, place in enumerate(np.unravel_index(number, grid)):
            for i in range(per_axis // 2):
                angle = place * 10000 ** (-i / (per_axis / 2))
                pair = slice(axis * per_axis + 2 * i, axis * per_axis + 2 * i + 2)
                a, b = row[pair]
                row[pair] = (
                    a * math.cos(angle) - b * math.sin(angle),
                    b * math.cos(angle) + a * math.sin(angle),
                )
    return x


def plain_block(x, params, idx=None, grid=GRID):
    """Compute a block on one sample [N, width]; positions only with rope's `idx`."""
    width = x.shape[-1]
    qkv = plain_linear(plain_norm(x, params["norm1"]), params["qkv"])
    heads = []
    for head in range(HEADS):
        size = width // HEADS
        q, k, v = (
            qkv[:, part * width + head * size : part * width + (head + 1) * size]
            for part in range(3)
        )
        if idx is not None:
            q, k = plain_rope(q, idx, grid), plain_rope(k, idx, grid)
        scores = np.exp(q @ k.T / math.sqrt(size))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v)
    x = x + plain_linear(np.concatenate(heads, axis=-1), params["proj"])
    normed = plain_norm(x, params["norm2"])
    y = plain_linear(normed, params["fc1"])
    if "fc3" in params:  # SwiGLU
        y = y / (1 + np.exp(-y)) * plain_linear(normed, params["fc2"])
        return x + plain_linear(y, params["fc3"])
    y = y * 0.5 * (1 + np.vectorize(math.erf)(y / math.sqrt(2)))
    return x + plain_linear(y, params["fc2"])


def plain_stack(x, params, idx=None):
    depth = len(params["blocks"]["fc1"]["bias"])
    for layer in range(depth):
        block = jax.tree.map(lambda leaf, i=layer: leaf[i], params["blocks"])
        x = plain_block(x, block, idx)
    return x


def plain_sincos(idx, grid, dim):
    """Return [t | h | w] codes of sin then cos, cut to `dim`."""
    per_axis = 2 * math.ceil(dim / 6)
    rows = []
    for number in idx:
        row = []
        for place in np.unravel_index(number, grid):
            angles = [
                place * 10000 ** (-i / (per_axis / 2)) for i in range(per_axis // 2)
            ]
            row += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
        rows.append(row[:dim])
    return np.array(rows)


def plain_tubelets(video):
    """Cut one clip into rows of flattened 2 x 4 x 4 tubelets."""
    return np.stack(
        [
            video[2 * t : 2 * t + 2, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4].ravel()
            for t, h, w in itertools.product(*map(range, GRID))
        ]
    )


def double(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
