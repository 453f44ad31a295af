"""Work is counted as often as it runs, for CPUs, TPUs and GPUs."""

import math
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vjepa_jax.models.layers import Stack, TransformerConfig
from vjepa_jax.parallel import sharding
from vjepa_jax.program import flops, hlo


def count_work(function, *args, **options):
    text = jax.jit(function, **options).lower(*args).compile().as_text()
    return hlo.count_work(text)


def test_matmuls_in_nested_loops_count_as_often_as_they_run(rng):
    outer, inner, m, k, n = (int(x) for x in rng.integers(2, 9, 5) * (1, 1, 8, 8, 8))

    def function(x, w):
        def again(x, _):
            return jnp.tanh(x @ w @ w.T), None

        def repeat(x, _):
            return jax.lax.scan(again, x, length=inner)[0], None

        return jax.lax.scan(repeat, x @ w @ w.T, length=outer)[0]

    counted = count_work(function, jnp.ones((m, k)), jnp.ones((k, n)))
    assert counted.matmul_flops == (1 + outer * inner) * 2 * 2 * m * k * n
    assert counted.flops == counted.matmul_flops
    assert counted.kernel_flops == counted.remat_flops == 0
    assert not counted.unknown_loops and not counted.collectives


def test_batched_matmuls_and_convolutions_are_counted():
    def function(x, y, image, kernel):
        scores = jnp.einsum("bqhc,bkhc->bhqk", x, y)
        return scores, jax.lax.conv(image, kernel, (2, 2), "VALID")

    b, q, k, h, c = 2, 6, 5, 3, 8
    args = [(b, q, h, c), (b, k, h, c), (1, 3, 9, 9), (4, 3, 3, 3)]
    counted = count_work(function, *map(jnp.ones, args))
    taps = 4 * 4 * 3 * 3  # a 3 x 3 window at 4 x 4 positions
    assert counted.matmul_flops == 2 * b * h * q * k * c + 2 * taps * 3 * 4


@pytest.mark.parametrize("remat", ["none", "dots_no_batch", "attention", "full"])
def test_recomputed_forward_passes_are_counted_apart(remat):
    """Backward costs two forward passes; what is stored is not computed again."""
    size, tokens, batch = flops.Transformer(3, 64, 128), 32, 2
    config = TransformerConfig(
        num_heads=2, scan_layers=True, remat=remat, attention="xla", **vars(size)
    )
    stack = Stack(config)
    x = jnp.zeros((batch, tokens, size.width))
    params = jax.eval_shape(stack.init, jax.random.key(0), x)

    def loss(params, x):
        return stack.apply(params, x)[0].sum()

    grad = jax.grad(loss, argnums=(0, 1))
    counted = count_work(grad, nn.unbox(params), x)
    layers = batch * size.depth
    forward = batch * size.forward(tokens)
    # The last matmul's output is not used again; the softmax needs the scores.
    last = layers * 2 * tokens * size.width * size.mlp_dim
    scores = layers * 2 * tokens**2 * size.width
    repeated = {
        "none": 0,
        "dots_no_batch": scores,
        "attention": forward - last - scores,
        "full": forward - last,
    }[remat]
    assert counted.flops == 3 * forward + repeated
    assert counted.remat_flops == repeated


def test_collectives_are_listed_by_kind_size_and_count():
    mesh = sharding.make_mesh(2, 4)
    depth, width, batch = 3, 64, 16

    def spread(*axes):
        return NamedSharding(mesh, PartitionSpec(*axes))

    w = jax.ShapeDtypeStruct((depth, width, width), jnp.float32)
    w = w.update(sharding=spread(None, "fsdp"))
    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    x = x.update(sharding=spread(("data", "fsdp")))

    def loss(w, x):
        def layer(x, w):
            x = jnp.tanh(x @ w)
            return jax.lax.with_sharding_constraint(x, spread(("data", "fsdp"))), None

        return jax.lax.scan(layer, x, w)[0].sum()

    counted = count_work(jax.grad(loss), w, x, out_shardings=w.sharding)
    of_layer = 4 * width * width
    gathers = [c for c in counted.collectives if c.kind == "all-gather"]
    assert sum(c.bytes for c in gathers) >= 2 * depth * of_layer  # forward, backward
    assert {c.count for c in gathers} == {depth}
    reduced = [
        c
        for c in counted.collectives
        if c.kind in ("all-reduce", "reduce-scatter")
        and max(s.bytes for s in c.shapes) >= of_layer / 4
    ]
    assert reduced and all(c.count == depth for c in reduced)
    # One device's share of the batch, forward and two backward matmuls.
    assert counted.matmul_flops == 3 * depth * 2 * batch // 8 * width * width


# Shortened text of the TPU compiler: a loop whose gather is two fusions with one
# channel; a fused reduction and scatter, and another after the loop; two permutes
# with one channel; a matmul of attention as a dilated convolution; a kernel with a
# line break in its metadata.
TPU = textwrap.dedent("""\
    HloModule jit_step, is_scheduled=true

    %gather_start (p.0: bf16[8,64]) -> bf16[64,64] {
      %p.0 = bf16[8,64]{1,0} parameter(0)
      ROOT %all-gather.1 = bf16[64,64]{1,0} all-gather(%p.0), channel_id=7, dimensions={0}
    }

    %gather_done (p.1: bf16[8,64]) -> bf16[64,64] {
      %p.1 = bf16[8,64]{1,0} parameter(0)
      ROOT %all-gather.2 = bf16[64,64]{1,0} all-gather(%p.1), channel_id=7, dimensions={0}
    }

    %all-reduce-scatter.3.clone (input.1: bf16[64,64]) -> bf16[8,64] {
      %input.1 = bf16[64,64]{1,0} parameter(0)
      %all-reduce.5 = bf16[64,64]{1,0} all-reduce(%input.1), channel_id=9, to_apply=%add
      ROOT %slice.1 = bf16[8,64]{1,0} dynamic-slice(%all-reduce.5), sizes={8,64}
    }

    %all-reduce-scatter.4 (input.2: bf16[64,64]) -> bf16[8,64] {
      %input.2 = bf16[64,64]{1,0} parameter(0)
      %all-reduce.6 = bf16[64,64]{1,0} all-reduce(%input.2), channel_id=9, to_apply=%add
      ROOT %slice.2 = bf16[8,64]{1,0} dynamic-slice(%all-reduce.6), sizes={8,64}
    }

    %body (state: (s32[], bf16[16,64], bf16[8,64])) -> (s32[], bf16[16,64], bf16[8,64]) {
      %state = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[8,64]{1,0}) parameter(0)
      %i = s32[]{:T(128)} get-tuple-element(%state), index=0
      %x = bf16[16,64]{1,0} get-tuple-element(%state), index=1
      %w = bf16[8,64]{1,0} get-tuple-element(%state), index=2
      %start = bf16[64,64]{1,0} fusion(%w), kind=kCustom, calls=%gather_start
      %done = bf16[64,64]{1,0} fusion(%w), kind=kCustom, calls=%gather_done
      %convolution.1 = bf16[16,64]{1,0} convolution(%x, %done), dim_labels=bf_io->bf, metadata={op_name="jit(step)/rematted_computation/fc1/dot_general"}
      %scattered = bf16[8,64]{1,0} fusion(%done), kind=kCustom, calls=%all-reduce-scatter.3.clone
      %one = s32[]{:T(128)} constant(STEP)
      %next = s32[]{:T(128)} add(%i, %one)
      ROOT %tuple.1 = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[8,64]{1,0}) tuple(%next, %convolution.1, %scattered)
    }

    %condition (state.1: (s32[], bf16[16,64], bf16[8,64])) -> pred[] {
      %state.1 = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[8,64]{1,0}) parameter(0)
      %i.1 = s32[]{:T(128)} get-tuple-element(%state.1), index=0
      %bound = s32[]{:T(128)} constant(24)
      ROOT %compare.1 = pred[]{:T(512)} compare(%i.1, %bound), direction=LT
    }

    ENTRY %main (q: f32[4,2,16,8], k: f32[4,2,16,8], w.1: bf16[8,64]) -> bf16[16,64] {
      %q = bf16[4,2,16,8]{3,2,1,0} parameter(0)
      %k = bf16[4,2,16,8]{3,2,1,0} parameter(1)
      %w.1 = bf16[8,64]{1,0} parameter(2)
      %scores = f32[4,2,16,16]{3,2,1,0} convolution(%q, %k), window={size=4x2 stride=3x1 lhs_dilate=4x2}, dim_labels=01bf_01oi->01bf
      %splash_mha_fwd_residuals.1 = bf16[4,2,16,8]{3,2,1,0} custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/attention
    /splash" stack_frame_id=1}
      %splash_mha_dkv_no_residuals.1 = (bf16[4,2,16,8]{3,2,1,0}, bf16[4,2,16,8]{3,2,1,0}) custom-call(%q, %k, %k), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/attention/splash"}
      %sort_kernel.2 = bf16[16,64]{1,0} custom-call(%w.1), custom_call_target="tpu_custom_call", metadata={op_name="jit(step)/sort"}
      %first = s32[]{:T(128)} constant(START)
      %first.1 = s32[]{:T(128)} copy(%first)
      %tuple.2 = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[8,64]{1,0}) tuple(%first.1, %sort_kernel.2, %w.1)
      %while.1 = (s32[]{:T(128)}, bf16[16,64]{1,0}, bf16[8,64]{1,0}) while(%tuple.2), condition=%condition, body=%body
      %last = bf16[8,64]{1,0} fusion(%sort_kernel.2), kind=kCustom, calls=%all-reduce-scatter.4
      %moved.1 = bf16[8,64]{1,0} collective-permute(%last), channel_id=1
      %moved.2 = bf16[8,64]{1,0} collective-permute(%moved.1), channel_id=1
      ROOT %out = bf16[16,64]{1,0} get-tuple-element(%while.1), index=1
    }
    """)  # noqa: E501


@pytest.mark.parametrize(
    ("start", "step", "trips"),
    [(0, 1, 24), (0, 2, 12), (0, 5, 5), (1, 1, 23), (4, 5, 4), (24, 1, 0)],
)
def test_programs_of_tpus_are_read(start, step, trips):
    text = TPU.replace("START", str(start)).replace("STEP", str(step))
    counted = hlo.count_work(text)
    fc1 = 2 * 16 * 64 * 64
    one_matmul = 2 * 4 * 2 * 16 * 16 * 8  # of attention: [B, H, N, N] times C
    assert counted.matmul_flops == trips * fc1 + one_matmul
    assert counted.remat_flops == trips * fc1
    # Two matmuls forward, five backward.
    assert counted.kernel_flops == 7 * one_matmul
    assert counted.unknown_kernels == {"sort_kernel": 1}
    full, part = 64 * 64 * 2, 8 * 64 * 2
    found = sorted((c.kind, c.count, c.bytes) for c in counted.collectives)
    assert found == sorted(
        [
            ("all-gather", trips, trips * full),
            ("collective-permute", 1, part),
            ("collective-permute", 1, part),
            ("reduce-scatter", 1, full),
            ("reduce-scatter", trips, trips * full),
        ]
    )


@pytest.mark.parametrize("unknown", ["constant(24)", "constant(START)"])
def test_loops_without_a_known_end_or_start_are_named(unknown):
    text = TPU.replace(unknown, "parameter(3)")
    counted = hlo.count_work(text.replace("START", "0").replace("STEP", "1"))
    assert counted.unknown_loops == ("while.1",)
    assert {c.count for c in counted.collectives} == {1}


# The same for a loop in another loop, which carries the start of its counter.
NESTED = textwrap.dedent("""\
    HloModule jit_step, is_scheduled=true

    %inner (s: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
      %s = (s32[], f32[8,8]{1,0}) parameter(0)
      %i = s32[] get-tuple-element(%s), index=0
      %x = f32[8,8]{1,0} get-tuple-element(%s), index=1
      %dot.1 = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
      %one = s32[] constant(1)
      %next = s32[] add(%i, %one)
      ROOT %tuple.1 = (s32[], f32[8,8]{1,0}) tuple(%next, %dot.1)
    }

    %inner_condition (s.1: (s32[], f32[8,8])) -> pred[] {
      %s.1 = (s32[], f32[8,8]{1,0}) parameter(0)
      %i.1 = s32[] get-tuple-element(%s.1), index=0
      %bound = s32[] constant(12)
      ROOT %compare.1 = pred[] compare(%i.1, %bound), direction=LT
    }

    %outer (s.2: (s32[], f32[8,8], s32[])) -> (s32[], f32[8,8], s32[]) {
      %s.2 = (s32[], f32[8,8]{1,0}, s32[]) parameter(0)
      %j = s32[] get-tuple-element(%s.2), index=0
      %x.2 = f32[8,8]{1,0} get-tuple-element(%s.2), index=1
      %from = s32[] get-tuple-element(%s.2), index=2
      %from.1 = s32[] copy(%from)
      %tuple.2 = (s32[], f32[8,8]{1,0}) tuple(%from.1, %x.2)
      %while.1 = (s32[], f32[8,8]{1,0}) while(%tuple.2), condition=%inner_condition, body=%inner
      %x.3 = f32[8,8]{1,0} get-tuple-element(%while.1), index=1
      %one.1 = s32[] constant(1)
      %next.1 = s32[] add(%j, %one.1)
      ROOT %tuple.3 = (s32[], f32[8,8]{1,0}, s32[]) tuple(%next.1, %x.3, CARRIED)
      %given = (s32[], f32[8,8]{1,0}, s32[]) opt-barrier(%tuple.3)
    }

    %outer_condition (s.3: (s32[], f32[8,8], s32[])) -> pred[] {
      %s.3 = (s32[], f32[8,8]{1,0}, s32[]) parameter(0)
      %j.1 = s32[] get-tuple-element(%s.3), index=0
      %bound.1 = s32[] constant(3)
      ROOT %compare.2 = pred[] compare(%j.1, %bound.1), direction=LT
    }

    ENTRY %main (x.4: f32[8,8]) -> f32[8,8] {
      %x.4 = f32[8,8]{1,0} parameter(0)
      %zero = s32[] constant(0)
      %first = s32[] constant(2)
      %tuple.4 = (s32[], f32[8,8]{1,0}, s32[]) tuple(%zero, %x.4, %first)
      %tuple.5 = (s32[], f32[8,8]{1,0}, s32[]) opt-barrier(%tuple.4)
      %while.2 = (s32[], f32[8,8]{1,0}, s32[]) while(%tuple.4), condition=%outer_condition, body=%outer
      ROOT %out = f32[8,8]{1,0} get-tuple-element(%while.2), index=1
    }
    """)  # noqa: E501


@pytest.mark.parametrize(
    ("carried", "trips", "unknown"), [("%from", 10, ()), ("%j", 1, ("while.1",))]
)
@pytest.mark.parametrize(
    ("state", "result"),
    [
        ("%tuple.4", "ROOT %tuple.3"),
        ("%tuple.5", "%tuple.3"),  # both behind barriers
    ],
)
def test_starts_are_followed_out_of_loops(carried, trips, unknown, state, result):
    text = NESTED.replace("CARRIED", carried).replace("ROOT %tuple.3", result)
    counted = hlo.count_work(text.replace("while(%tuple.4)", f"while({state})"))
    assert counted.unknown_loops == unknown
    assert counted.matmul_flops == 3 * trips * 2 * 8 * 8 * 8


# Shortened text of XLA for GPUs: a covariance and a mean, exchanged as one array.
GPU = textwrap.dedent("""\
    HloModule jit_step, is_scheduled=true

    %wrapped_concatenate_computation (a: f32[4096], b: f32[64]) -> f32[4160] {
      %a = f32[4096]{0} parameter(0)
      %b = f32[64]{0} parameter(1)
      ROOT %concatenate.1 = f32[4160]{0} concatenate(%a, %b), dimensions={0}
    }

    %fused_concatenate (c: f32[32], d: bf16[16,8], e: f32[16,8]) -> f32[160] {
      %d = bf16[16,8]{1,0} parameter(1)
      %convert = f32[16,8]{1,0} convert(%d)
      %e = f32[16,8]{1,0} parameter(2)
      %multiply = f32[16,8]{1,0} multiply(%convert, %e)
      %bitcast.2 = f32[128]{0} bitcast(%multiply)
      %c = f32[32]{0} parameter(0)
      ROOT %concatenate.2 = f32[160]{0} concatenate(%bitcast.2, %c), dimensions={0}
    }

    ENTRY %main (x: f32[64,64], y: f32[64], v: f32[32], w: bf16[16,8], z: f32[16,8]) -> f32[4160] {
      %x = f32[64,64]{1,0} parameter(0)
      %y = f32[64]{0} parameter(1)
      %v = f32[32]{0} parameter(2)
      %w = bf16[16,8]{1,0} parameter(3)
      %z = f32[16,8]{1,0} parameter(4)
      %bitcast.1 = f32[4096]{0} bitcast(%x)
      %wrapped_concatenate = f32[4160]{0} fusion(%bitcast.1, %y), kind=kLoop, calls=%wrapped_concatenate_computation
      %all-reduce-start.1 = f32[4160]{0} all-reduce-start(%wrapped_concatenate), channel_id=1, to_apply=%add
      %all-reduce-done.1 = f32[4160]{0} all-reduce-done(%all-reduce-start.1)
      %concatenate_fusion = f32[160]{0} fusion(%v, %w, %z), kind=kLoop, calls=%fused_concatenate
      %all-reduce.3 = f32[160]{0} all-reduce(%concatenate_fusion), channel_id=3, to_apply=%add
      %all-gather-start.1 = ((bf16[16,8]{1,0}, f32[32]{0}), (bf16[128,8]{1,0}, f32[256]{0})) all-gather-start(%w, %v), channel_id=4, dimensions={0}
      %all-gather-done.1 = (bf16[128,8]{1,0}, f32[256]{0}) all-gather-done(%all-gather-start.1)
      ROOT %all-reduce.2 = f32[4160]{0} all-reduce(%all-reduce-done.1), channel_id=2, to_apply=%add
    }
    """)  # noqa: E501


def test_arrays_exchanged_as_one_are_listed():
    found = hlo.count_work(GPU).collectives
    reduced = [c for c in found if c.kind == "all-reduce"]
    flat, joined = sorted(
        (c for c in reduced if c.bytes == 4 * 4160), key=lambda c: len(c.shapes)
    )
    assert [s.dims for s in joined.shapes] == [(64, 64), (64,)]
    assert [s.dims for s in flat.shapes] == [(4160,)]
    (computed,) = (c for c in reduced if c.bytes == 4 * 160)
    assert [s.dims for s in computed.shapes] == [(16, 8), (32,)]
    assert len(reduced) == 3


def test_every_array_that_is_gathered_at_once_counts():
    (found,) = (c for c in hlo.count_work(GPU).collectives if c.kind == "all-gather")
    assert [(s.dtype, s.dims) for s in found.shapes] == [
        ("bf16", (128, 8)),
        ("f32", (256,)),
    ]


def test_sizes_of_types():
    sizes = {"pred": 1, "bf16": 2, "f32": 4, "u8": 1, "s64": 8, "f8e4m3fn": 1}
    for dtype, size in sizes.items():
        assert hlo.Shape(dtype, (3, 5)).bytes == math.prod((3, 5)) * size
