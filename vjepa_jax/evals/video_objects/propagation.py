"""Labels of a video's first frame, carried on to the others by similar features.

Every place of a frame takes the labels of the places most like it in the first frame
and the last ones before it, near where it is itself (space-time correspondence,
arXiv 1906.05743; DINO's and DINOv3's protocol on DAVIS). Nothing is trained.
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
    """How labels are carried on.

    Attributes:
      last_frames: those before the one in question, n; the first frame of the
        video is seen as well.
      radius: how far apart two places may be, in tokens (Euclidean).
      top_k: places that a place takes its labels from, by weights.
      temperature: of the softmax over their cosines.
      places_at_once: on each device; bounds the memory, see `__call__`.
    """

    last_frames: int = 15
    radius: float = 12.0
    top_k: int = 5
    temperature: float = 0.2
    places_at_once: int = 256

    def __call__(
        self, features: Iterator[np.ndarray], first: np.ndarray, mesh: Mesh
    ) -> Iterator[jax.Array]:
        """Carry labels on, frame by frame.

        The cosines of P places are float32 [P, (1 + n) h w]: of the 256 on a device at
        480 x 848 pixels and patches of 16 pixels 26 MB. A frame's places are split over
        the mesh.

        Args:
          features: float [h, w, D] of every frame, the first included.
          first: float [h, w, K], the labels of the first frame: shares of each of K
            classes or objects.
          mesh: of the devices that compute.

        Yields:
          float32 [h, w, K] of each frame after the first.
        """
        height, width, num_labels = first.shape
        count = height * width
        slots = 1 + self.last_frames
        features = iter(features)
        start = _unit(next(features))
        context = np.zeros((slots, *start.shape), np.float32)
        labels = np.zeros((slots, count, num_labels), np.float32)
        context[0], labels[0] = start, first.reshape(count, -1)
        whole = sharding.replicated(mesh)
        context, labels = jax.device_put((context, labels), whole)
        for frame, of_frame in enumerate(features, start=1):
            # The oldest but the first one makes room.
            slot = 1 + (frame - 1) % max(self.last_frames, 1)
            found, context, labels = _step(
                jax.device_put(_unit(of_frame), whole),
                context,
                labels,
                jnp.asarray(frame),
                jnp.asarray(slot),
                how=self,
                width=width,
                mesh=mesh,
            )
            yield found.reshape(height, width, num_labels)


def _unit(features: np.ndarray) -> np.ndarray:
    """Scale features [h, w, D] to unit length: float32 [h * w, D]."""
    flat = features.reshape(-1, features.shape[-1]).astype(np.float32)
    return flat / np.maximum(np.linalg.norm(flat, axis=-1, keepdims=True), 1e-12)


@functools.partial(
    jax.jit, static_argnames=("how", "width", "mesh"), donate_argnums=(1, 2)
)
def _step(queries, context, labels, frame, slot, *, how, width, mesh):
    """Label one frame and put it into the context, if there is room for any."""
    slots, count = context.shape[:2]
    at_once = min(how.places_at_once, -(-count // mesh.size))
    missing = -count % (at_once * mesh.size)
    rows, columns = jnp.divmod(jnp.arange(count + missing), width)
    places = jnp.stack([rows, columns], axis=1)
    is_filled = jnp.repeat(jnp.arange(slots) < frame, count)
    top_k = min(how.top_k, slots * count)

    def label_share(queries, places, seen, seen_places, seen_labels, is_filled):
        def label(part):
            queries, at = part
            cosine = jnp.dot(queries, seen.T, precision="highest")
            distance = jnp.square(at[:, None] - seen_places).sum(-1)
            is_near = jnp.tile(distance <= how.radius**2, (1, slots))
            cosine = jnp.where(is_near & is_filled, cosine, _ABSENT)
            best, nearest = jax.lax.top_k(cosine, top_k)
            best = jnp.where(best == _ABSENT, -jnp.inf, best / how.temperature)
            return jnp.einsum("pk,pkl->pl", jax.nn.softmax(best), seen_labels[nearest])

        chunks = (x.reshape(-1, at_once, x.shape[-1]) for x in (queries, places))
        return jax.lax.map(label, tuple(chunks)).reshape(len(queries), -1)

    over_devices = PartitionSpec(sharding.AXES)
    whole = PartitionSpec()
    found = jax.shard_map(
        label_share,
        mesh=mesh,
        in_specs=(over_devices, over_devices, whole, whole, whole, whole),
        out_specs=over_devices,
        check_vma=False,
    )(
        jnp.pad(queries, ((0, missing), (0, 0))),
        places,
        context.reshape(slots * count, -1),
        places[:count],
        labels.reshape(slots * count, -1),
        is_filled,
    )[:count]
    found = jax.lax.with_sharding_constraint(found, sharding.replicated(mesh))
    if slots > 1:
        context = context.at[slot].set(queries)
        labels = labels.at[slot].set(found)
    return found, context, labels
