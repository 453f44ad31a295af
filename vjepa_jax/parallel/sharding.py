"""The device mesh, and the shardings of state and batch on it."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vjepa_jax.base.errors import UserError

AXES = ("data", "fsdp")
# Largest `fsdp` that 0 stands for: the GPUs of a host, or a ring of a TPU slice. More
# shards save little memory and make gathers slow.
_AUTO_FSDP = 8
# Logical axis -> mesh axes. Batches are sharded over both mesh axes. Parameters,
# moments and target are sharded over `fsdp` along their first axis that has this rule
# and that `fsdp` divides. For a kernel this is the input axis, so that gathers and
# reductions are contiguous. A parameter with a single axis (bias, norm) is replicated:
# gathering it would cost more than storing it.
RULES = (
    ("act_batch", AXES),
    ("act_len", None),
    ("act_embed", None),
    ("embed", "fsdp"),
    ("mlp", "fsdp"),
    ("heads", "fsdp"),
    ("patch", None),
    ("norm", None),
    ("layers", None),
)
_SHARDED = tuple(name for name, axes in RULES if axes == "fsdp")
_BATCH = PartitionSpec(AXES)


def make_mesh(
    data: int = -1, fsdp: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Make the (data, fsdp) mesh. One of the sizes may be -1: all that remain.

    With several TPU slices, only `data` crosses them, so that between slices only
    gradients are exchanged, once per update.

    Args:
      data: size of the axis of pure data parallelism: batches are sharded over it,
        parameters are replicated.
      fsdp: size of the axis over which both batches and parameters are sharded; 0: the
        largest divisor of the number of devices (of a slice) up to 8.
      devices: devices of the mesh, which need not be present; None: all of this run.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `fsdp` does not
        fit into a slice.
    """
    devices = jax.devices() if devices is None else list(devices)
    count, slices = len(devices), count_slices(devices)
    if fsdp == 0:
        fsdp = math.gcd(count // slices, _AUTO_FSDP)
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
    if sizes["data"] % slices:
        raise UserError(
            f"mesh.fsdp={sizes['fsdp']} does not fit into one of {slices} slices of "
            f"{count // slices} devices: take a divisor of {count // slices}"
        )
    within = (sizes["data"] // slices, sizes["fsdp"])
    # No axes of a torus of 4x4x4 multiply to 8: one of them must be split.
    split = {"allow_split_physical_axes": True}
    if slices == 1:
        grid = mesh_utils.create_device_mesh(within, devices, **split)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1), devices, **split
        )
    # Auto axes, because Linen's logical constraints reject explicit ones.
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 2)


@contextlib.contextmanager
def use(mesh: Mesh | None) -> Iterator[None]:
    """Compile and run on a mesh, with the logical axis rules that belong to it.

    Both are needed: without the rules, activations and attention would be replicated.

    Args:
      mesh: None leaves the mesh and the rules that are in use.
    """
    rules = () if mesh is None else RULES
    with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
        yield


def count_slices(devices: Sequence[Any]) -> int:
    """Count the TPU slices among devices; all other devices count as one slice.

    jax orders GPUs by host, so that `fsdp`, the inner axis of the mesh, stays within a
    host if it fits.
    """
    if devices[0].platform != "tpu":
        return 1
    return len({getattr(device, "slice_index", None) or 0 for device in devices})


def check_divides(mesh: Mesh, batch_size: int, accumulate_steps: int) -> None:
    """Check that every device gets equally many clips of every microbatch.

    Raises:
      UserError: the batch size is not divisible.
    """
    parts = mesh.size * accumulate_steps
    if batch_size % parts:
        raise UserError(
            f"batch_size={batch_size} does not divide by {mesh.size} devices x "
            f"accumulate_steps={accumulate_steps}: take a multiple of {parts}"
        )


@dataclasses.dataclass(frozen=True)
class Decision:
    """The sharding of one array of the state.

    Attributes:
      path: path of the leaf, with slashes.
      shape, dtype: of the global array.
      sharding: its sharding.
      reason: why it is not sharded along the first axis that has the rule; "" if it is.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    sharding: NamedSharding
    reason: str

    @property
    def device_bytes(self) -> int:
        """Bytes per device."""
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize

    @property
    def bytes(self) -> int:
        """Bytes of the global array."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        spec = ", ".join(str(axes) for axes in self.sharding.spec)
        line = (
            f"{self.path} {self.dtype.name}{list(self.shape)} ({spec}) "
            f"{self.device_bytes / 2**20:.2f} MiB"
        )
        return f"{line}  # {self.reason}" if self.reason else line


def _choose(
    axes: Sequence[str | None], shape: tuple[int, ...], fsdp: int
) -> tuple[PartitionSpec, str]:
    """Choose the axis of an array that is sharded over `fsdp`, with the reason."""
    named = [i for i, name in enumerate(axes) if name not in (None, "layers")]
    if fsdp == 1 or not named:
        return PartitionSpec(), ""
    if len(named) == 1:
        return PartitionSpec(), "one axis: replicated"
    missed: list[str] = []
    for i in named:
        if axes[i] in _SHARDED and shape[i] % fsdp == 0:
            return PartitionSpec(*(None,) * i, "fsdp"), ", ".join(missed)
        if axes[i] in _SHARDED:
            missed.append(f"{fsdp} does not divide {axes[i]}={shape[i]}")
    return PartitionSpec(), ", ".join([*missed, "replicated"])


def decide(init: Callable[[jax.Array], Any], mesh: Mesh) -> list[Decision]:
    """Decide the sharding of each array of the state that `init` returns.

    Args:
      init: `init(key)`, whose leaves are boxed with their logical axes.
      mesh: the mesh.

    Returns:
      One decision per leaf, in tree order.
    """
    boxed = jax.eval_shape(init, jax.random.key(0))
    specs = jax.tree.leaves(
        nn.get_partition_spec(boxed), is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(boxed))
    decisions = []
    for (path, leaf), axes in zip(leaves, specs, strict=True):
        spec, reason = _choose(tuple(axes), leaf.shape, mesh.shape["fsdp"])
        decisions.append(
            Decision(
                jax.tree_util.keystr(path, simple=True, separator="/"),
                leaf.shape,
                np.dtype(leaf.dtype),
                NamedSharding(mesh, spec),
                reason,
            )
        )
    return decisions


def as_tree(decisions: Sequence[Decision], state: Any) -> Any:
    """Return the shardings as a tree with the structure of `state`."""
    shardings = [decision.sharding for decision in decisions]
    return jax.tree.unflatten(jax.tree.structure(state), shardings)


def state_shardings(init: Callable[[jax.Array], Any], mesh: Mesh) -> Any:
    """Return the shardings of the state that `init` returns, as a tree like it."""
    shapes = nn.unbox(jax.eval_shape(init, jax.random.key(0)))
    return as_tree(decide(init, mesh), shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of a batch: its first axis over all devices."""
    return NamedSharding(mesh, _BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, PartitionSpec())


def shard_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Turn this process's part of a batch into global arrays on the devices."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(
        lambda x: jax.make_array_from_process_local_data(sharding, x), dict(batch)
    )


def summary(decisions: Sequence[Decision]) -> str:
    """Return one line with the size of the state, in total and per device."""
    total = sum(d.bytes for d in decisions) / 2**20
    each = sum(d.device_bytes for d in decisions) / 2**20
    return f"state of {total:.1f} MiB, {each:.1f} MiB on each device"
