"""Propagation of labels from a video's first frame to the others by their features.

Every token of a frame takes the labels of the most similar tokens at nearby positions
in the first frame and in the last frames before it (space-time correspondence, arXiv
1906.05743; the protocol of DINO and DINOv3 on DAVIS). Nothing is trained.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from vjepa_jax.parallel import sharding

_ABSENT = -2.0  # below every cosine


@dataclasses.dataclass(frozen=True)
class Propagation:
    """Propagates labels.

    Attributes:
      last_frames: frames before the current one that are sources of labels, n, besides
        the first frame of the video.
      radius: maximum distance of source and target within a frame, in tokens
        (Euclidean).
      top_k: sources of a token; their labels are averaged with weights.
      temperature: of the softmax over cosines that gives the weights.
      tokens_at_once: computed at once on each device; bounds the memory, see
        `__call__`.
    """

    last_frames: int = 15
    radius: float = 12.0
    top_k: int = 5
    temperature: float = 0.2
    tokens_at_once: int = 256

    def __call__(
        self, features: Iterator[np.ndarray], first: np.ndarray, mesh: Mesh
    ) -> Iterator[jax.Array]:
        """Propagate labels frame by frame.

        The cosines of P tokens are float32 [P, (1 + n) h w]: with 256 tokens on a
        device, 480 x 848 pixels and patches of 16 pixels, 26 MB. The tokens of a frame
        are sharded over the mesh.

        Args:
          features: float [h, w, D] of every frame, including the first.
          first: float [h, w, K], shares of K labels in the first frame.
          mesh: of the devices that compute.

        Yields:
          Labels, float32 [h, w, K], of each frame after the first.
        """
        height, width, num_labels = first.shape
        count = height * width
        slots = 1 + self.last_frames
        features = iter(features)
        start = _unit(next(features))
        context = np.zeros((slots, *start.shape), np.float32)
        labels = np.zeros((slots, count, num_labels), np.float32)
        context[0], labels[0] = start, first.reshape(count, -1)
        replicated = sharding.replicated(mesh)
        context, labels = jax.device_put((context, labels), replicated)
        for frame, of_frame in enumerate(features, start=1):
            # Replaces the oldest frame but the first.
            slot = 1 + (frame - 1) % max(self.last_frames, 1)
            predicted, context, labels = _step(
                jax.device_put(_unit(of_frame), replicated),
                context,
                labels,
                jnp.asarray(frame),
                jnp.asarray(slot),
                propagation=self,
                width=width,
                mesh=mesh,
            )
            yield predicted.reshape(height, width, num_labels)


def _unit(features: np.ndarray) -> np.ndarray:
    """Scale features [h, w, D] to unit length: float32 [h * w, D]."""
    flat = features.reshape(-1, features.shape[-1]).astype(np.float32)
    return flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)


@functools.partial(
    jax.jit, static_argnames=("propagation", "width", "mesh"), donate_argnums=(1, 2)
)
def _step(
    queries: jax.Array,
    context: jax.Array,
    labels: jax.Array,
    frame: jax.Array,
    slot: jax.Array,
    *,
    propagation: Propagation,
    width: int,
    mesh: Mesh,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Label one frame and put it into slot `slot` of the context.

    Args:
      queries: [h w, D], the frame's features of unit length.
      context: [1 + n, h w, D], features of the sources; donated.
      labels: [1 + n, h w, K], labels of the sources; donated.
      frame: index of the frame in the video; fewer slots are filled before frame n.
      slot: where the frame is put, if `propagation.last_frames` is not 0.
      propagation: settings.
      width: w.
      mesh: of the devices that compute.

    Returns:
      The frame's labels [h w, K], context and labels.
    """
    slots, count = context.shape[:2]
    at_once = min(propagation.tokens_at_once, -(-count // mesh.size))
    missing = -count % (at_once * mesh.size)
    rows, columns = jnp.divmod(jnp.arange(count + missing), width)
    positions = jnp.stack([rows, columns], axis=1)
    is_filled = jnp.repeat(jnp.arange(slots) < frame, count)
    top_k = min(propagation.top_k, slots * count)

    def label_shard(queries, positions, sources, source_positions, labels, is_filled):
        def label(part):
            queries, at = part
            cosine = jnp.dot(queries, sources.T, precision="highest")
            distance = jnp.square(at[:, None] - source_positions).sum(-1)
            is_near = jnp.tile(distance <= propagation.radius**2, (1, slots))
            cosine = jnp.where(is_near & is_filled, cosine, _ABSENT)
            best, nearest = jax.lax.top_k(cosine, top_k)
            best = jnp.where(best == _ABSENT, -jnp.inf, best / propagation.temperature)
            return jnp.einsum("pk,pkl->pl", jax.nn.softmax(best), labels[nearest])

        chunks = (x.reshape(-1, at_once, x.shape[-1]) for x in (queries, positions))
        return jax.lax.map(label, tuple(chunks)).reshape(len(queries), -1)

    over_devices = PartitionSpec(sharding.AXES)
    replicated = PartitionSpec()
    predicted = jax.shard_map(
        label_shard,
        mesh=mesh,
        in_specs=(over_devices,) * 2 + (replicated,) * 4,
        out_specs=over_devices,
        check_vma=False,
    )(
        jnp.pad(queries, ((0, missing), (0, 0))),
        positions,
        context.reshape(slots * count, -1),
        positions[:count],
        labels.reshape(slots * count, -1),
        is_filled,
    )[:count]
    predicted = jax.lax.with_sharding_constraint(predicted, sharding.replicated(mesh))
    if slots > 1:
        context = context.at[slot].set(queries)
        labels = labels.at[slot].set(predicted)
    return predicted, context, labels
