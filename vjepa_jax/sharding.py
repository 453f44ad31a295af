"""Where arrays live: the mesh, the one table of rules, shardings of state and batch."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vjepa_jax.default_config import UserError

# Logical axis -> mesh axes. Batches are split over both mesh axes, parameters and
# moments over `fsdp` along their embedding axis; everything else is whole everywhere.
RULES = (
    ("act_batch", ("data", "fsdp")),
    ("act_len", None),
    ("act_embed", None),
    ("embed", "fsdp"),
    ("mlp", None),
    ("heads", None),
    ("patch", None),
    ("norm", None),
    ("layers", None),
)
_BATCH = PartitionSpec(("data", "fsdp"))


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """Make the (data, fsdp) mesh over all devices; one axis may be -1 to fill it.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    count = jax.device_count()
    sizes = {"data": data, "fsdp": fsdp}
    free = [name for name, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) == 1 and fixed > 0 and count % fixed == 0:
        sizes[free[0]] = count // fixed
    if math.prod(sizes.values()) != count or min(sizes.values()) < 1:
        raise UserError(
            f"mesh.data={data} times mesh.fsdp={fsdp} does not make {count} devices: "
            "set one of them to -1 and the other to a divisor"
        )
    # Auto axes, because Linen's logical constraints reject explicit ones.
    return jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 2
    )


def check_divides(mesh: Mesh, batch_size: int, accumulate_steps: int) -> None:
    """Raise UserError unless every device gets whole clips of every microbatch."""
    parts = mesh.size * accumulate_steps
    if batch_size % parts:
        raise UserError(
            f"batch_size={batch_size} does not divide by {mesh.size} devices x "
            f"accumulate_steps={accumulate_steps}: take a multiple of {parts}"
        )


def state_shardings(init: Callable[[jax.Array], Any], mesh: Mesh) -> Any:
    """Map the logical axes of a TrainState to shardings on `mesh`, leaf by leaf.

    Raises:
      UserError: a dimension does not divide by the mesh axis that would split it.
    """
    boxed = jax.eval_shape(init, jax.random.key(0))
    specs = nn.get_partition_spec(boxed)
    shardings = nn.logical_to_mesh_sharding(specs, mesh, RULES)

    def check(path, leaf, sharding):
        try:
            sharding.shard_shape(leaf.shape)
        except ValueError:
            raise UserError(
                f"{jax.tree_util.keystr(path)} of shape {leaf.shape} cannot be split "
                f"as {sharding.spec} over mesh.fsdp={mesh.shape['fsdp']}: take a "
                "divisor of the model's width"
            ) from None

    jax.tree_util.tree_map_with_path(check, nn.unbox(boxed), shardings)
    return shardings


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, _BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: Mapping[str, Mapping[str, np.ndarray]], mesh: Mesh):
    """Put this process's share of a batch on its devices, as one global array each."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), dict(batch)
    )


def describe(shapes: Any, shardings: Any) -> str:
    """Return one line on how the state is spread: counts and MiB per device."""
    total = per_device = 0
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    for leaf, sharding in leaves:
        size = np.dtype(leaf.dtype).itemsize
        total += math.prod(leaf.shape) * size
        per_device += math.prod(sharding.shard_shape(leaf.shape)) * size
    return (
        f"state of {total / 2**20:.1f} MiB, {per_device / 2**20:.1f} MiB on each device"
    )
