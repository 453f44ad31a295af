"""What a config computes on a mesh: modules, layout of the state, the step itself.

Nothing here touches data or files, so that a step can be compiled and looked at without
either, even for devices that are not there.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vjepa_jax.config.defaults import MAIN_STREAM, ConfigDict
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective.state import TrainState, abstract_state, make_init, unbox
from vjepa_jax.objective.step import Objective, Stream, make_train_step
from vjepa_jax.parallel import sharding
from vjepa_jax.program import build


@dataclasses.dataclass(frozen=True)
class Program:
    """The update of a config, laid out on a mesh.

    Attributes:
      config: it was made from.
      mesh: it is laid out on.
      encoder, predictor: its modules.
      teacher: a frozen encoder to predict instead of the target; None: the target.
      teacher_params: its parameters as `jax.ShapeDtypeStruct` with shardings, by the
        rules of the state; None without a teacher.
      streams: its streams of clips, with their masks.
      init: from a key to the boxed TrainState.
      shapes: TrainState of shapes and dtypes.
      decisions: how each of its arrays is spread, in tree order.
      shardings: the same as a TrainState of shardings.
      train_step: the pure update.
    """

    config: ConfigDict
    mesh: Mesh
    encoder: VideoEncoder
    predictor: Predictor
    teacher: VideoEncoder | None
    teacher_params: Any
    streams: Mapping[str, Stream]
    init: Callable[[jax.Array], TrainState]
    shapes: TrainState
    decisions: Sequence[sharding.Decision]
    shardings: TrainState
    train_step: Callable[..., Any]

    def abstract_state(self) -> TrainState:
        """Return the state as `jax.ShapeDtypeStruct` with shardings."""
        return _with_shardings(self.shapes, self.shardings)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Return the global batch as `jax.ShapeDtypeStruct` with shardings."""
        sizes = build.batch_sizes(self.config)
        over_devices = sharding.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(
                (sizes[name], *shape), "uint8", sharding=over_devices
            )
            for name, shape in build.video_shapes(self.config).items()
        }

    def step_flops(self) -> int:
        """Count the model's FLOPs of one update, over all devices."""
        return build.step_flops(
            self.config, self.encoder, self.predictor, self.streams, self.teacher
        )

    def make_state(self) -> TrainState:
        """Compute the state of a new run, on its devices."""
        make = jax.jit(self.init, out_shardings=self.shardings)
        return unbox(make(jax.random.key(self.config.seed)))

    def lower(self) -> jax.stages.Lowered:
        """Lower `train_step(state, batch[, teacher_params])`; the state is donated."""
        step = jax.jit(
            self.train_step,
            out_shardings=(self.shardings, sharding.replicated(self.mesh)),
            donate_argnums=0,
        )
        extra = () if self.teacher is None else (self.teacher_params,)
        with sharding.use(self.mesh):
            return step.lower(self.abstract_state(), self.abstract_batch(), *extra)


def _abstract_params(encoder: VideoEncoder, clip_shape, mesh: Mesh) -> Any:
    def init(key):
        return encoder.init(key, jnp.zeros((1, *clip_shape)))["params"]

    return _with_shardings(abstract_state(init), sharding.state_shardings(init, mesh))


def _with_shardings(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )


def make_program(
    config: ConfigDict, mesh: Mesh, trained: ConfigDict | None = None
) -> Program:
    """Make the program of a config.

    Args:
      config: of a run, validated.
      mesh: of the run's devices, real or described.
      trained: the config that the teacher was trained with; None: there is no teacher.

    Raises:
      UserError: the config contradicts itself or does not fit the mesh.
    """
    for size in build.batch_sizes(config).values():
        sharding.check_divides(mesh, size, config.accumulate_steps)
    encoder, predictor = build.make_models(config)
    streams, tx = build.make_streams(config, encoder), build.make_optimizer(config)
    teacher = None
    if trained is not None:
        teacher = build.make_teacher(config, trained, encoder, predictor)
    clip_shape = build.video_shapes(config)[MAIN_STREAM]
    teacher_params = teacher and _abstract_params(teacher, clip_shape, mesh)
    init = make_init(encoder, predictor, tx, clip_shape, config.optim.spike_window)
    train_step = make_train_step(
        encoder,
        predictor,
        tx,
        build.make_schedules(config),
        streams,
        Objective(**config.objective),
        config.seed,
        config.accumulate_steps,
        build.make_spike_guard(config),
        teacher,
        config.model.target_dtype,
    )
    shapes, decisions = abstract_state(init), sharding.decide(init, mesh)
    return Program(
        config=config,
        mesh=mesh,
        encoder=encoder,
        predictor=predictor,
        teacher=teacher,
        teacher_params=teacher_params,
        streams=streams,
        init=init,
        shapes=shapes,
        decisions=decisions,
        shardings=sharding.as_tree(decisions, shapes),
        train_step=train_step,
    )
