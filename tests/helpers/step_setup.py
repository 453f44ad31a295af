"""A tiny model and its step, as the training script builds them."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective import optim
from vjepa_jax.objective.masked import LossTerms, MaskedObjective, Stream
from vjepa_jax.objective.masking import MaskSpec
from vjepa_jax.objective.state import init_shapes, make_init
from vjepa_jax.objective.step import make_train_step
from vjepa_jax.program import build

STEPS = 200  # length of the schedules
SHAPE = (4, 16, 16, 3)  # a grid of 2 x 4 x 4 tokens
MASKS = {
    "short": MaskSpec(10, 12, num_blocks=3, spatial_scale=(0.2, 0.2)),
    "long": MaskSpec(4, 18, num_blocks=1, spatial_scale=(0.7, 0.7)),
}
STREAMS = {"video": Stream(MASKS)}
REGULARISED = LossTerms(variance_weight=0.1, covariance_weight=0.01)


def abstract_of(config):
    """Return the state of a config's run as shapes, all of it on the first device."""
    clips = batch_of(1, build.video_shapes(config)[build.MAIN_STREAM])
    objective = build.make_objective(config)
    init = make_init(objective, build.make_optimizer(config), clips)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one),
        init_shapes(init),
    )


def make_init_of(encoder, predictor, tx, shape, spike_window=0):
    """Make `init` of the state of a run with these models."""
    objective = MaskedObjective(encoder, predictor, {})
    return make_init(objective, tx, batch_of(1, shape), spike_window)


class Setup:
    """A model and its step function."""

    def __init__(
        self,
        streams=STREAMS,
        terms=REGULARISED,
        scan_layers=True,
        accumulate_steps=1,
        eps=1e-8,
        encoder=None,
        predictor=None,
        teacher=None,
    ):
        """Make them; `encoder` and `predictor` change fields of the models."""
        fields = {"depth": 2, "width": 32, "mlp_dim": 64, "patch_size": 4}
        fields |= {"num_heads": 2, "scan_layers": scan_layers}
        self.encoder = VideoEncoder(**fields | (encoder or {}))
        out_dim = (teacher or self.encoder).out_dim
        fields = {"depth": 1, "width": 16, "mlp_dim": 32, "out_dim": out_dim}
        fields |= {"num_heads": 2, "scan_layers": scan_layers}
        self.predictor = Predictor(**fields | (predictor or {}))
        self.schedules = {
            "learning_rate": optim.warmup_cosine(1e-3, 3e-3, 0.0, 2, STEPS),
            "weight_decay": optim.cosine(0.04, 0.04, STEPS),
            "ema_momentum": optim.linear(0.99, 1.0, STEPS),
        }
        self.tx = optim.make_optimizer(
            self.schedules["learning_rate"], self.schedules["weight_decay"], eps=eps
        )
        self.objective = MaskedObjective(
            self.encoder,
            self.predictor,
            streams,
            terms,
            ema_momentum=self.schedules["ema_momentum"],
            teacher=teacher,
        )
        self.init = make_init(self.objective, self.tx, batch_of(1))
        self.step = make_train_step(
            self.objective,
            self.tx,
            self.schedules,
            seed=5,
            accumulate_steps=accumulate_steps,
        )

    def loss_fn(self, params, target, batch, masks, step):
        """Compute the loss with given masks."""
        return self.objective.loss(params, target, batch, masks, None, step)

    @functools.cached_property
    def initial_state(self):
        """The state before the first step, as NumPy arrays."""
        return copy_to_host(nn.unbox(jax.jit(self.init)(jax.random.key(0))))

    @functools.cached_property
    def compiled_step(self):
        return jax.jit(self.step, donate_argnums=0)

    @functools.cached_property
    def compiled_loss(self):
        return jax.jit(self.loss_fn)

    def random_state(self, rng):
        """Return a state of random numbers: no two parts of it are alike."""
        shapes = nn.unbox(jax.eval_shape(self.init, jax.random.key(0)))
        params, target = random_like((shapes.params, shapes.target), rng)
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
        return zeros.replace(params=params, target=target)


def random_like(tree, rng, scale=0.3):
    """Return a tree of the same shapes with random numbers."""
    return jax.tree.map(
        lambda x: rng.normal(0, scale, x.shape).astype(np.float32), nn.unbox(tree)
    )


def copy_to_host(tree):
    """Copy: on a CPU the host sees the buffers themselves, which steps take away."""
    return jax.tree.map(np.array, jax.device_get(tree))


def videos(rng, batch, shape=SHAPE):
    return rng.integers(0, 256, (batch, *shape), dtype=np.uint8)


def batch_of(batch, shape=SHAPE):
    """Return a global batch of clips as shapes."""
    return {"video": jax.ShapeDtypeStruct((batch, *shape), jnp.uint8)}


def as_batch(video):
    return {"video": video}


def one_device():
    return jax.make_mesh(
        (1, 1),
        ("data", "fsdp"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:1],
    )


def fixed_masks(rng, batch, specs=MASKS, num_tokens=32):
    """Draw arbitrary disjoint index sets of the sizes that `specs` asks for."""
    out = {}
    for name, spec in specs.items():
        order = np.stack([rng.permutation(num_tokens) for _ in range(batch)])
        context = np.sort(order[:, : spec.num_context], -1)
        target = np.sort(order[:, spec.num_context :][:, : spec.num_target], -1)
        out[name] = (jnp.asarray(context), jnp.asarray(target))
    return out
