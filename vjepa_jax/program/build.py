"""Make the program of a config on a mesh: models, objective, state, step.

Nothing here reads data or files, so that a step can be compiled without either, even
for devices that this machine does not have.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import MAIN_STREAM, ConfigDict
from vjepa_jax.models import registry
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.functional import computation_dtype
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective import masking, optim
from vjepa_jax.objective.masked import LossTerms, MaskedObjective, Stream
from vjepa_jax.objective.state import TrainState, init_shapes, make_init, unbox
from vjepa_jax.objective.step import SpikeGuard, make_train_step
from vjepa_jax.parallel import sharding
from vjepa_jax.program import flops

# Fields that encoder and predictor share.
_SHARED_FIELDS = (
    "scale_init",
    "image_embed",
    "pos_embed",
    "scan_layers",
    "remat",
    "attention",
    "dtype",
)


def video_shapes(config: ConfigDict) -> dict[str, tuple[int, int, int, int]]:
    """Return {stream: (T, H, W, C) of its clips}, the main stream first."""
    clips = {MAIN_STREAM: config.data, **config.streams}
    return {
        name: (clip.num_frames, clip.resolution, clip.resolution, 3)
        for name, clip in clips.items()
    }


def batch_sizes(config: ConfigDict) -> dict[str, int]:
    """Return {stream: clips per update, summed over all devices}."""
    sizes = {MAIN_STREAM: config.batch_size}
    for name, fields in config.streams.items():
        sizes[name] = fields.batch_size or config.batch_size
    return sizes


def make_models(
    config: ConfigDict, platform: str | None = None
) -> tuple[VideoEncoder, Predictor]:
    """Make encoder and predictor.

    Args:
      config: of a run.
      platform: of the devices that compute, see `functional.computation_dtype`; None:
        the models are only described.

    Raises:
      UserError: a value does not fit the others; the message names its key.
    """
    model = config.model
    shared = {key: model[key] for key in _SHARED_FIELDS}
    if platform is not None:
        shared["dtype"] = computation_dtype(model.dtype, platform)
    fields = dict(model.encoder)
    size = fields.pop("size")
    try:
        encoder = registry.make_encoder(size, mlp=model.mlp, **fields, **shared)
    except ValueError as error:
        raise UserError(f"config.model.encoder.size: {error}") from None
    if encoder.levels and encoder.levels[-1] >= encoder.depth:
        raise UserError(
            f"config.model.encoder.levels={encoder.levels}: the last block of size "
            f"{size} is {encoder.depth - 1}"
        )
    base_grid = tuple(model.base_grid) or None
    if model.pos_embed == "sincos" and base_grid is None:
        base_grid = encoder.grid(video_shapes(config)[MAIN_STREAM])
    encoder = encoder.clone(base_grid=base_grid)
    fields = dict(model.predictor)
    del fields["mask_token_per"]
    deep_input = fields.pop("deep_input")
    mlp = fields.pop("mlp") or model.mlp
    used = 1 + max(i for per in _mask_indices(config).values() for i in per)
    num_mask_tokens = fields.pop("num_mask_tokens") or used
    out_dim = fields.pop("out_dim") or encoder.out_dim
    if config.objective.target == "pixels":
        out_dim = encoder.tubelet_size * encoder.patch_size**2 * 3
    if num_mask_tokens < used:
        raise UserError(
            f"config.model.predictor.num_mask_tokens={num_mask_tokens}: {used} are used"
            ": give that many, or 0"
        )
    predictor = registry.make_predictor(
        **fields,
        **shared,
        mlp=mlp,
        base_grid=base_grid,
        input_dim=encoder.width if deep_input else 0,
        out_dim=out_dim,
        num_mask_tokens=num_mask_tokens,
    )
    return encoder, predictor


def make_teacher(
    config: ConfigDict, trained: ConfigDict, encoder: VideoEncoder, predictor: Predictor
) -> VideoEncoder:
    """Make the frozen encoder whose features a student predicts.

    Args:
      config: of the student.
      trained: config of the teacher's training.
      encoder, predictor: the student's.

    Raises:
      UserError: the teacher has too few levels, another token grid than the student, or
        another number of channels than the student predicts.
    """
    teacher, _ = make_models(trained)
    # The teacher computes in the way that the student's config sets.
    teacher = teacher.clone(
        dtype=encoder.dtype,
        attention=encoder.attention,
        scan_layers=encoder.scan_layers,
    )
    wanted = config.teacher.output_levels
    if wanted > max(len(teacher.levels), 1):
        raise UserError(
            f"config.teacher.output_levels={wanted}: the teacher of "
            f"{config.teacher.path} has {max(len(teacher.levels), 1)}"
        )
    if wanted and teacher.levels:
        teacher = teacher.clone(output_levels=wanted)
    for name, shape in video_shapes(config).items():
        try:
            grid = teacher.grid(shape)
        except ValueError as error:
            raise UserError(f"teacher {config.teacher.path}: {error}") from None
        if grid != encoder.grid(shape):
            raise UserError(
                f"the token grid of stream '{name}' is {grid} for the teacher of "
                f"{config.teacher.path}, {encoder.grid(shape)} for the student: set "
                "config.model.encoder.patch_size, config.model.encoder.tubelet_size "
                "and config.model.image_embed to the teacher's"
            )
    if predictor.out_dim != teacher.out_dim:
        raise UserError(
            f"config.model.predictor.out_dim={config.model.predictor.out_dim}: the "
            f"teacher's features have {teacher.out_dim} channels; set it to that"
        )
    return teacher


def _mask_indices(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """Return {stream: mask token of each of its mask types, in their order}.

    A ConfigDict sorts its keys, so mask types have an explicit `token`.
    """
    masks = {MAIN_STREAM: config.masks}
    masks |= {name: fields.masks for name, fields in config.streams.items()}
    per = config.model.predictor.mask_token_per
    return {
        name: tuple(
            fields.token if per == "mask" else number * (per == "stream")
            for fields in types.values()
        )
        for number, (name, types) in enumerate(masks.items())
    }


def make_streams(config: ConfigDict, encoder: VideoEncoder) -> dict[str, Stream]:
    """Make the streams with their masks, the main one first.

    Raises:
      UserError: a mask's budget does not fit the stream's grid.
    """
    shapes, indices = video_shapes(config), _mask_indices(config)
    fields = {MAIN_STREAM: (config.masks, config.weight, "masks")}
    for name, of_stream in config.streams.items():
        fields[name] = of_stream.masks, of_stream.weight, f"streams.{name}.masks"
    return {
        name: Stream(
            make_masks(masks, encoder.grid(shapes[name]), key), weight, indices[name]
        )
        for name, (masks, weight, key) in fields.items()
    }


def make_masks(
    masks: ConfigDict, grid: masking.Grid, key: str = "masks"
) -> dict[str, masking.MaskSpec]:
    """Make the mask types at `key` of a config, with their token budgets filled in.

    Raises:
      UserError: a budget does not fit the grid.
    """
    specs, num_tokens = {}, math.prod(grid)
    for name, fields in masks.items():
        fields = dict(fields)
        del fields["token"]
        group_size = fields.pop("group_size")
        spec = masking.MaskSpec(**fields)
        is_complement = spec.full_complement or spec.pred_full_complement
        context, target = spec.num_context, spec.num_target
        if not (context and target):
            try:
                budget = masking.default_budget(spec, grid, group_size)
            except ValueError as error:
                raise UserError(f"config.{key}.{name}: {error}") from None
            if is_complement and (context or target):
                budget = num_tokens - target, num_tokens - context
            context, target = context or budget[0], target or budget[1]
        counts = f"config.{key}.{name}: num_context={context} and num_target={target}"
        if min(context, target) < 1:
            raise UserError(f"{counts}; both must be positive: hide less, or more")
        if context + target > num_tokens:
            raise UserError(
                f"{counts} exceed the clip's {num_tokens} tokens: lower one of them"
            )
        if is_complement and context + target < num_tokens:
            raise UserError(
                f"{counts} do not add up to the clip's {num_tokens} tokens, as a "
                "complement must: set one of them to 0"
            )
        fields |= {"num_context": context, "num_target": target}
        specs[name] = masking.MaskSpec(**fields)
    return specs


def make_schedules(config: ConfigDict) -> dict[str, optim.Schedule]:
    """Make the schedules of learning rate, weight decay and EMA momentum."""
    o, steps = config.optim, int(config.optim.schedule_scale * config.total_steps)
    rates = o.start_learning_rate, o.learning_rate, o.final_learning_rate
    if o.schedule == "cosine":
        rate = optim.warmup_cosine(*rates, o.warmup_steps, steps)
    elif o.schedule == "linear":
        rate = optim.linear_decay(*rates[1:], steps)
    else:
        # Without `schedule_scale`: the anneal ends with the run.
        spans = o.warmup_steps, o.anneal_steps, config.total_steps
        rate = optim.warmup_stable_decay(*rates, *spans)
    return {
        "learning_rate": rate,
        "weight_decay": optim.cosine(o.weight_decay, o.final_weight_decay, steps),
        "ema_momentum": optim.linear(config.ema.start, config.ema.end, steps),
    }


def make_optimizer(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """Make AdamW."""
    schedules, o = make_schedules(config), config.optim
    rates = schedules["learning_rate"], schedules["weight_decay"]
    return optim.make_optimizer(
        *rates, (o.b1, o.b2), o.eps, o.clip_norm, o.clip_start_step
    )


def make_spike_guard(config: ConfigDict) -> SpikeGuard | None:
    """Make the guard against loss spikes; None if it is off."""
    o = config.optim
    return SpikeGuard(o.spike_window, o.spike_deviations) if o.spike_window else None


def make_objective(
    config: ConfigDict,
    trained: ConfigDict | None = None,
    platform: str | None = None,
) -> MaskedObjective:
    """Make the objective of a run.

    Args:
      config: of the run.
      trained: config of the teacher's training; None without a teacher.
      platform: see `make_models`.

    Raises:
      UserError: the config contradicts itself.
    """
    encoder, predictor = make_models(config, platform)
    teacher = trained and make_teacher(config, trained, encoder, predictor)
    return MaskedObjective(
        encoder,
        predictor,
        make_streams(config, encoder),
        LossTerms(**config.objective),
        ema_momentum=make_schedules(config)["ema_momentum"],
        teacher=teacher,
        target_dtype=config.model.target_dtype,
    )


def step_flops(config: ConfigDict, objective: MaskedObjective) -> int:
    """Count the FLOPs of one update of the global batch, all streams together."""

    def size_of(module: VideoEncoder | Predictor) -> flops.Transformer:
        return flops.Transformer(module.depth, module.width, module.mlp_dim, module.mlp)

    encoder, predictor = objective.encoder, objective.predictor
    sizes, total = batch_sizes(config), 0
    is_pixels = objective.terms.target == "pixels"
    for name, shape in video_shapes(config).items():
        grid, masks = encoder.grid(shape), objective.streams[name].masks.values()
        total += sizes[name] * flops.train_step_flops(
            size_of(encoder),
            size_of(predictor),
            num_tokens=math.prod(grid),
            patch_dim=math.prod(shape) // math.prod(grid),
            masks=[(mask.num_context, mask.num_target) for mask in masks],
            feature_dim=encoder.out_dim,
            input_dim=predictor.input_dim,
            predict_context=predictor.predict_context,
            out_dim=predictor.out_dim,
            target=None if is_pixels else size_of(objective.teacher or encoder),
        )
    return total


@dataclasses.dataclass(frozen=True)
class Program:
    """The update of a config, sharded over a mesh.

    Attributes:
      config: of the run.
      mesh: of the run's devices, real or described.
      objective: what is minimised.
      schedules: functions of the finished steps by name.
      video_shapes: {stream: (T, H, W, C)} of a clip, the main stream first.
      grids: {stream: (T', H', W') tokens of a clip}.
      batch_sizes: {stream: clips per update, summed over all devices}.
      batch: the global batch as `jax.ShapeDtypeStruct` with shardings.
      frozen: parameters of the teacher as `jax.ShapeDtypeStruct` with shardings; None
        without a teacher.
      init: from a key to the boxed TrainState.
      state: TrainState of `jax.ShapeDtypeStruct` with shardings.
      decisions: how each array of the state is sharded, in tree order.
      train_step: the pure update.
    """

    config: ConfigDict
    mesh: Mesh
    objective: MaskedObjective
    schedules: Mapping[str, optim.Schedule]
    video_shapes: Mapping[str, tuple[int, int, int, int]]
    grids: Mapping[str, masking.Grid]
    batch_sizes: Mapping[str, int]
    batch: Mapping[str, jax.ShapeDtypeStruct]
    frozen: Any
    init: Callable[[jax.Array], TrainState]
    state: TrainState
    decisions: Sequence[sharding.Decision]
    train_step: Callable[..., Any]

    @property
    def num_clips(self) -> int:
        """Clips per update, all streams together."""
        return sum(self.batch_sizes.values())

    @property
    def step_flops(self) -> int:
        """The model's FLOPs of one update, over all devices."""
        return step_flops(self.config, self.objective)

    @property
    def summary(self) -> str:
        """Two lines: the model and its sharding; the schedules at the last step."""
        config, last = self.config, self.config.total_steps - 1
        # Schedules may be longer than the run: these are not the config's final values.
        values = {name: float(f(last)) for name, f in self.schedules.items()}
        rates = (f"{name.replace('_', ' ')} {x:.4g}" for name, x in values.items())
        return (
            f"{config.model.encoder.size} encoder on {self.grids[MAIN_STREAM]} tokens "
            f"in {self.objective.encoder.dtype}; "
            f"{sharding.summary(self.decisions)}; mesh {dict(self.mesh.shape)}\n"
            f"at the last step {', '.join(rates)}"
        )

    def make_state(self) -> TrainState:
        """Compute the state of a new run on its devices."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        make = jax.jit(self.init, out_shardings=shardings)
        return unbox(make(jax.random.key(self.config.seed)))

    def lower(self) -> jax.stages.Lowered:
        """Lower `train_step(state, batch[, frozen])`; the state is donated."""
        shardings = jax.tree.map(lambda x: x.sharding, self.state)
        step = jax.jit(
            self.train_step,
            out_shardings=(shardings, sharding.replicated(self.mesh)),
            donate_argnums=0,
        )
        extra = () if self.frozen is None else (self.frozen,)
        with sharding.use(self.mesh):
            return step.lower(self.state, self.batch, *extra)


def _abstract_params(encoder: VideoEncoder, clip_shape: Any, mesh: Mesh) -> Any:
    def init(key: jax.Array) -> Any:
        return encoder.init(key, jnp.zeros((1, *clip_shape)))["params"]

    shapes, shardings = init_shapes(init), sharding.state_shardings(init, mesh)
    return jax.tree.map(lambda x, s: x.update(sharding=s), shapes, shardings)


def make_program(
    config: ConfigDict, mesh: Mesh, trained: ConfigDict | None = None
) -> Program:
    """Make the program of a config.

    Args:
      config: of a run, validated.
      mesh: of the run's devices, real or described.
      trained: see `make_objective`.

    Raises:
      UserError: the config contradicts itself or does not fit the mesh.
    """
    shapes, sizes = video_shapes(config), batch_sizes(config)
    for size in sizes.values():
        sharding.check_divides(mesh, size, config.accumulate_steps)
    objective = make_objective(config, trained, mesh.devices.flat[0].platform)
    schedules, tx = make_schedules(config), make_optimizer(config)
    split = sharding.batch_sharding(mesh)
    batch = {
        name: jax.ShapeDtypeStruct((sizes[name], *shape), "uint8", sharding=split)
        for name, shape in shapes.items()
    }
    init = make_init(objective, tx, batch, config.optim.spike_window)
    state, decisions = init_shapes(init), sharding.decide(init, mesh)
    shardings, teacher = sharding.as_tree(decisions, state), objective.teacher
    guard, steps = make_spike_guard(config), config.accumulate_steps
    return Program(
        config=config,
        mesh=mesh,
        objective=objective,
        schedules=schedules,
        video_shapes=shapes,
        grids={name: objective.encoder.grid(s) for name, s in shapes.items()},
        batch_sizes=sizes,
        batch=batch,
        frozen=teacher and _abstract_params(teacher, shapes[MAIN_STREAM], mesh),
        init=init,
        state=jax.tree.map(lambda x, s: x.update(sharding=s), state, shardings),
        decisions=decisions,
        train_step=make_train_step(objective, tx, schedules, config.seed, steps, guard),
    )
