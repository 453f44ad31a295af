"""State and batches are sharded by the rules, and every decision is reported."""

import dataclasses
import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec
from step_setup import make_init_of

from vjepa_jax.base.errors import UserError
from vjepa_jax.models import layers
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective import optim
from vjepa_jax.objective.state import init_shapes, unbox
from vjepa_jax.parallel import sharding

VIDEO = (4, 8, 8, 3)


def init_of(width=32, predictor_width=16, pos_embed="rope"):
    kwargs = {"num_heads": 2, "scan_layers": True, "pos_embed": pos_embed}
    encoder = VideoEncoder(2, width, mlp_dim=48, patch_size=4, **kwargs)
    predictor = Predictor(1, predictor_width, mlp_dim=24, out_dim=width, **kwargs)
    tx = optim.make_optimizer(lambda step: 1e-3, lambda step: 0.1, clip_norm=1.0)
    return make_init_of(encoder, predictor, tx, VIDEO)


def by_name(tree):
    """Return {path: leaf} of a tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


@pytest.mark.parametrize(
    ("data", "fsdp", "shape"),
    [
        (-1, 1, (8, 1)),
        (4, 2, (4, 2)),
        (-1, 2, (4, 2)),
        (2, -1, (2, 4)),
        (8, -1, (8, 1)),
        (-1, 0, (1, 8)),
    ],
)
def test_mesh_has_the_sizes_given_and_fills_the_free_one(data, fsdp, shape):
    mesh = sharding.make_mesh(data, fsdp)
    assert dict(mesh.shape) == dict(zip(("data", "fsdp"), shape, strict=True))
    assert len({d.id for d in mesh.devices.flat}) == jax.device_count()


@pytest.mark.parametrize(
    ("data", "fsdp"),
    [(3, 1), (2, 2), (-1, 3), (16, -1), (-1, -1), (0, 8), (2, 0), (-2, -4)],
)
def test_mesh_that_does_not_fit_the_devices_is_refused(data, fsdp):
    with pytest.raises(UserError) as error:
        sharding.make_mesh(data, fsdp)
    for part in (f"mesh.data={data}", f"mesh.fsdp={fsdp or 8}", "8 devices"):
        assert part in str(error.value)


@pytest.mark.parametrize(("count", "parts"), [(1, 1), (4, 4), (6, 2)])
def test_fsdp_of_zero_takes_what_divides(count, parts):
    mesh = sharding.make_mesh(-1, 0, jax.devices()[:count])
    assert dict(mesh.shape) == {"data": count // parts, "fsdp": parts}


def slices_of(count, each):
    """Stand-ins for the devices of TPU slices."""
    return [
        types.SimpleNamespace(platform="tpu", slice_index=index // each)
        for index in range(count * each)
    ]


def test_parameters_do_not_cross_slices():
    assert sharding.count_slices(slices_of(2, 4)) == 2
    assert sharding.count_slices(jax.devices()) == 1
    with pytest.raises(UserError, match=r"mesh\.fsdp=8 does not fit into one of 2"):
        sharding.make_mesh(1, 8, slices_of(2, 4))


@dataclasses.dataclass(frozen=True)
class TorusChip:
    """A stand-in for one device of a TPU slice."""

    coords: tuple[int, int, int]
    slice_index: int
    id: int
    platform: str = "tpu"
    device_kind: str = "TPU v5"
    core_on_chip: int = 0
    process_index: int = 0


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize("shape", [(2, 2, 4), (4, 4, 4), (4, 4, 8)])
def test_fsdp_is_eight_neighbours_on_every_torus(shape, slices):
    places = list(np.ndindex(shape))
    chips = [
        TorusChip(coords, index, index * len(places) + i)
        for index in range(slices)
        for i, coords in enumerate(places)
    ]
    mesh = sharding.make_mesh(-1, 0, chips)
    assert dict(mesh.shape) == {"data": len(chips) // 8, "fsdp": 8}
    assert {chip.id for chip in mesh.devices.flat} == set(range(len(chips)))
    for row in mesh.devices:
        assert len({chip.slice_index for chip in row}) == 1
        sides = np.ptp([chip.coords for chip in row], axis=0) + 1
        assert sides.prod() == 8


@pytest.mark.parametrize(
    ("batch_size", "accumulate_steps", "multiple"),
    [(12, 1, 8), (24, 2, 16), (8, 2, 16)],
)
def test_batch_that_devices_cannot_share_is_refused(
    batch_size, accumulate_steps, multiple
):
    mesh = sharding.make_mesh(4, 2)
    with pytest.raises(UserError) as error:
        sharding.check_divides(mesh, batch_size, accumulate_steps)
    assert f"batch_size={batch_size}" in str(error.value)
    assert f"multiple of {multiple}" in str(error.value)
    sharding.check_divides(mesh, multiple, accumulate_steps)


@pytest.mark.parametrize("pos_embed", ["rope", "sincos"])
def test_every_logical_axis_has_a_rule(pos_embed):
    boxed = jax.eval_shape(init_of(pos_embed=pos_embed), jax.random.key(0))
    specs = jax.tree.leaves(
        nn.get_partition_spec((boxed.params, boxed.target)),
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )
    leaves = jax.tree.leaves(nn.unbox((boxed.params, boxed.target)))
    assert len(specs) == len(leaves) > 40
    named = {name for spec in specs for name in spec if name is not None}
    assert named | set(layers.ACT_AXES) == {name for name, _ in sharding.RULES}
    # Every axis of every leaf has a name, but for the mask tokens' first.
    unnamed = [spec for spec in specs if None in spec]
    assert unnamed == [PartitionSpec(None, "embed")]
    for spec, leaf in zip(specs, leaves, strict=True):
        assert len(spec) == len(leaf.shape)


def test_fsdp_splits_parameters_moments_and_target_alike():
    mesh = sharding.make_mesh(4, 2)
    init = init_of()
    shapes = init_shapes(init)
    shardings = sharding.state_shardings(init, mesh)
    for name, leaf in by_name(shapes.params).items():
        is_split = "fsdp" in by_name(shardings.params)[name].spec
        # Vectors are replicated: norms, biases, each of the mask tokens.
        vector = name.endswith(("bias", "scale")) or name == "predictor/mask_tokens"
        assert is_split != vector, (name, leaf.shape)
    of_adam = next(s for s in shardings.opt_state if hasattr(s, "mu"))
    params = jax.tree.leaves(shardings.params)
    assert jax.tree.leaves(of_adam.mu) == jax.tree.leaves(of_adam.nu) == params
    assert jax.tree.leaves(shardings.target) == jax.tree.leaves(
        shardings.params["encoder"]
    )
    # Nearly all numbers are halved.
    whole, part = 0, 0
    for s, x in zip(params, jax.tree.leaves(shapes.params), strict=True):
        whole, part = whole + x.size, part + np.prod(s.shard_shape(x.shape))
    assert part < 0.58 * whole  # at this width vectors are a tenth of all


def test_without_fsdp_the_state_is_replicated():
    shardings = sharding.state_shardings(init_of(), sharding.make_mesh(8, 1))
    shapes = init_shapes(init_of())
    for s, x in zip(jax.tree.leaves(shardings), jax.tree.leaves(shapes), strict=True):
        assert s.shard_shape(x.shape) == x.shape


def test_initial_state_is_sharded_and_independent_of_the_mesh():
    init = init_of()
    states = []
    for sizes in ((4, 2), (8, 1)):
        mesh = sharding.make_mesh(*sizes)
        shardings = sharding.state_shardings(init, mesh)
        with sharding.use(mesh):
            state = unbox(jax.jit(init, out_shardings=shardings)(jax.random.key(3)))
        for s, x in zip(
            jax.tree.leaves(shardings), jax.tree.leaves(state), strict=True
        ):
            assert x.sharding.is_equivalent_to(s, x.ndim)
        states.append(jax.device_get(state))
    for (name, a), b in zip(
        by_name(states[0]).items(), jax.tree.leaves(states[1]), strict=True
    ):
        # The same random bits; the last digit of the normal's inverse may differ.
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8, err_msg=name)


def test_batches_are_split_over_both_axes_in_order():
    mesh = sharding.make_mesh(4, 2)
    video = np.random.default_rng().integers(0, 256, (16, *VIDEO), dtype=np.uint8)
    batch = sharding.shard_batch({"video": video}, mesh)["video"]
    assert batch.shape == video.shape and batch.dtype == np.uint8
    starts = set()
    for shard in batch.addressable_shards:
        assert shard.data.shape == (2, *VIDEO)
        np.testing.assert_array_equal(shard.data, video[shard.index])
        starts.add(shard.index[0].start)
    assert starts == set(range(0, 16, 2))


LOGICAL = ("layers", "embed", "mlp", "heads", "patch", "norm", None)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(LOGICAL), st.integers(1, 48)), max_size=3),
    st.sampled_from([1, 2, 4, 8]),
)
def test_any_array_is_sharded_evenly_or_replicated_with_a_reason(axes, parts):
    names, shape = tuple(name for name, _ in axes), tuple(size for _, size in axes)
    mesh = sharding.make_mesh(-1, parts)

    def init(key):
        del key
        return {"x": nn.LogicallyPartitioned(jnp.zeros(shape), names)}

    (decision,) = sharding.decide(init, mesh)
    assert decision.path == "x" and decision.shape == shape
    spec = decision.sharding.spec
    split = [i for i, axis in enumerate(spec) if axis is not None]
    allowed = [
        i
        for i, name in enumerate(names)
        if name in ("embed", "mlp", "heads") and shape[i] % parts == 0
    ]
    is_vector = sum(name not in ("layers", None) for name in names) < 2
    if parts == 1 or is_vector:
        allowed = []
    assert split == allowed[:1]
    assert decision.device_bytes * (parts if split else 1) == decision.bytes
    # An array of several axes that is not sharded along the first has a reason.
    first = next((i for i, n in enumerate(names) if n in ("embed", "mlp", "heads")), -1)
    if parts > 1 and not is_vector and first >= 0 and split != [first]:
        assert f"does not divide {names[first]}={shape[first]}" in decision.reason


def test_a_width_that_fsdp_does_not_divide_leaves_the_rest_sharded():
    decisions = sharding.decide(init_of(predictor_width=12), sharding.make_mesh(1, 8))
    lines = {d.path: str(d) for d in decisions}
    # Only the input layer, along the encoder's width, and the MLP can be sharded.
    embed = lines["params/predictor/embed/kernel"]
    assert embed.startswith("params/predictor/embed/kernel float32[32, 12] (fsdp)")
    qkv = lines["params/predictor/stack/blocks/qkv/kernel"]
    assert qkv.endswith(
        "# 8 does not divide embed=12, 8 does not divide heads=36, replicated"
    )
    fc1 = lines["params/predictor/stack/blocks/fc1/kernel"]
    assert "(None, None, fsdp)" in fc1 and "8 does not divide embed=12" in fc1


def test_summary_counts_bytes_in_total_and_per_device():
    init = init_of(width=256, predictor_width=128)
    shapes = init_shapes(init)
    mebibytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes)) / 2**20
    text = sharding.summary(sharding.decide(init, sharding.make_mesh(8, 1)))
    assert text.count(f"{mebibytes:.1f} MiB") == 2
    decisions = sharding.decide(init, sharding.make_mesh(4, 2))
    text = sharding.summary(decisions)
    each = float(text.split(", ")[1].split()[0])
    assert f"{mebibytes:.1f} MiB" in text and 0.49 < each / mebibytes < 0.55  # rounded
    # The lines of the decisions add up to it.
    lines = [float(str(d).split("#")[0].split()[-2]) for d in decisions]
    assert math.isclose(sum(lines), each, abs_tol=0.01 * len(lines))


BLOCK = {
    "norm1/scale": (None,),
    "norm1/bias": (None,),
    "qkv/kernel": ("fsdp", None),
    "qkv/bias": (None,),
    "proj/kernel": ("fsdp", None),
    "proj/bias": (None,),
    "norm2/scale": (None,),
    "norm2/bias": (None,),
    "fc1/kernel": ("fsdp", None),
    "fc1/bias": (None,),
    "fc2/kernel": ("fsdp", None),
    "fc2/bias": (None,),
}
STACK = {f"stack/blocks/{name}": (None, *spec) for name, spec in BLOCK.items()}
NORM = {"norm/scale": (None,), "norm/bias": (None,)}
EMBED = {"embed/proj/kernel": (None, "fsdp"), "embed/proj/bias": (None,)}
ENCODER = EMBED | STACK | NORM
PREDICTOR = {
    "mask_tokens": (None, None),
    "embed/kernel": ("fsdp", None),
    "embed/bias": (None,),
    **STACK,
    **NORM,
    "proj/kernel": ("fsdp", None),
    "proj/bias": (None,),
}


def test_fsdp_shards_the_input_of_every_kernel():
    init = init_of()
    mesh = sharding.make_mesh(2, 4)
    shapes, specs = init_shapes(init), sharding.state_shardings(init, mesh)
    for name, expected in (("encoder", ENCODER), ("predictor", PREDICTOR)):
        ndim = {k: x.ndim for k, x in by_name(shapes.params[name]).items()}
        got = {
            # Trailing None may be left out.
            k: (*s.spec, *[None] * (ndim[k] - len(s.spec)))
            for k, s in by_name(specs.params[name]).items()
        }
        assert got == expected


def test_activations_are_sharded_over_the_batch(rng):
    """Without the constraint the compiler could gather the batch."""
    mesh = sharding.make_mesh(2, 4)
    stack = layers.Stack(layers.TransformerConfig(1, 16, 2, 32, scan_layers=True))
    x = jnp.asarray(rng.normal(size=(8, 3, 16)), jnp.float32)
    shapes = nn.unbox(jax.eval_shape(stack.init, jax.random.key(0), x))
    params = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)

    def shape_per_device(context):
        with context:
            # The input is replicated: only the constraint can shard the output.
            replicated_x = jax.device_put(x, sharding.replicated(mesh))
            y = jax.jit(lambda p, x: stack.apply(p, x)[0])(params, replicated_x)
            return y.sharding.shard_shape(x.shape)

    assert shape_per_device(sharding.use(mesh)) == (1, 3, 16)
    assert shape_per_device(jax.set_mesh(mesh)) == x.shape
