"""From a config to modules, masks and schedules: the only reader of those keys."""

import math

import optax

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import MAIN_STREAM, ConfigDict
from vjepa_jax.models import registry
from vjepa_jax.models.encoder import VideoEncoder
from vjepa_jax.models.predictor import Predictor
from vjepa_jax.objective import masking, optim
from vjepa_jax.objective.step import SpikeGuard, Stream
from vjepa_jax.program import flops


def video_shapes(config: ConfigDict) -> dict[str, tuple[int, int, int, int]]:
    """Return (T, H, W, C) of the clips of every stream, the main one first."""
    clips = {MAIN_STREAM: config.data, **config.streams}
    return {
        name: (clip.num_frames, clip.resolution, clip.resolution, 3)
        for name, clip in clips.items()
    }


def batch_sizes(config: ConfigDict) -> dict[str, int]:
    """Return the clips per update of every stream, over all devices."""
    sizes = {MAIN_STREAM: config.batch_size}
    for name, fields in config.streams.items():
        sizes[name] = fields.batch_size or config.batch_size
    return sizes


def make_models(config: ConfigDict):
    """Make encoder and predictor as the config says."""
    model = config.model
    shared = {
        key: model[key]
        for key in (
            "scale_init",
            "image_embed",
            "pos_embed",
            "scan_layers",
            "remat",
            "attention",
            "dtype",
        )
    }
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
    """Make the frozen encoder whose features the config's models are to predict.

    Args:
      config: of the student.
      trained: with which the teacher was trained.
      encoder, predictor: the student's.

    Raises:
      UserError: the teacher has not so many levels, cuts the student's clips into other
        tokens, or has other channels than the student predicts.
    """
    teacher, _ = make_models(trained)
    # Its own run, or conversion, may have computed in another way.
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
                f"the teacher of {config.teacher.path} cuts the clips of stream "
                f"'{name}' into {grid} tokens, the student into {encoder.grid(shape)}: "
                "take its config.model.encoder.patch_size and tubelet_size, and its "
                "config.model.image_embed"
            )
    if predictor.out_dim != teacher.out_dim:
        raise UserError(
            f"config.model.predictor.out_dim={config.model.predictor.out_dim}: the "
            f"features of the teacher have {teacher.out_dim} channels, set it to that"
        )
    return teacher


def _mask_indices(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """Return the mask token of every mask type of every stream, in their order.

    A ConfigDict's order is the alphabet's, hence the explicit `token` of mask types.
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
    """Make mask types, found at `key` of a config, with their token budgets filled in.

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
        if min(context, target) < 1:
            raise UserError(
                f"config.{key}.{name}: num_context={context} and num_target={target}: "
                "hide less, or more, so that both are there"
            )
        if context + target > num_tokens:
            raise UserError(
                f"config.{key}.{name}: num_context={context} and num_target={target} "
                f"exceed the clip's {num_tokens} tokens: lower one of them"
            )
        if is_complement and (
            context + target < num_tokens or min(context, target) < 1
        ):
            raise UserError(
                f"config.{key}.{name}: num_context={context} and num_target={target} "
                f"do not make the clip's {num_tokens} tokens, as a complement must: "
                "set one of them to 0"
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
        # As long as the run: an anneal that begins after its end would be none.
        spans = o.warmup_steps, o.anneal_steps, config.total_steps
        rate = optim.warmup_stable_decay(*rates, *spans)
    return {
        "learning_rate": rate,
        "weight_decay": optim.cosine(o.weight_decay, o.final_weight_decay, steps),
        "ema_momentum": optim.linear(config.ema.start, config.ema.end, steps),
    }


def describe_schedules(config: ConfigDict) -> str:
    """Return one line with the values that the last update sees.

    With schedules longer than the run (`optim.schedule_scale`) they are not the final
    ones of the config.
    """
    last = config.total_steps - 1
    values = {name: float(f(last)) for name, f in make_schedules(config).items()}
    return "at the last step " + ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}" for name, value in values.items()
    )


def make_optimizer(config: ConfigDict) -> optax.GradientTransformationExtraArgs:
    """Make AdamW as the config says."""
    schedules, o = make_schedules(config), config.optim
    return optim.make_optimizer(
        schedules["learning_rate"],
        schedules["weight_decay"],
        o.b1,
        o.b2,
        o.eps,
        o.clip_norm,
        o.clip_start_step,
    )


def make_spike_guard(config: ConfigDict) -> SpikeGuard | None:
    """Make the guard against loss spikes, None where the config has none."""
    o = config.optim
    return SpikeGuard(o.spike_window, o.spike_deviations) if o.spike_window else None


def step_flops(
    config: ConfigDict,
    encoder: VideoEncoder,
    predictor: Predictor,
    streams: dict[str, Stream],
    teacher: VideoEncoder | None = None,
) -> int:
    """Count the FLOPs of one update of the whole batch, all streams together."""

    def size_of(module):
        return flops.Transformer(module.depth, module.width, module.mlp_dim, module.mlp)

    sizes, total = batch_sizes(config), 0
    is_pixels = config.objective.target == "pixels"
    for name, shape in video_shapes(config).items():
        grid = encoder.grid(shape)
        total += sizes[name] * flops.train_step_flops(
            size_of(encoder),
            size_of(predictor),
            num_tokens=math.prod(grid),
            patch_dim=math.prod(shape) // math.prod(grid),
            masks=[(m.num_context, m.num_target) for m in streams[name].masks.values()],
            feature_dim=encoder.out_dim,
            input_dim=predictor.input_dim,
            predict_context=predictor.predict_context,
            out_dim=predictor.out_dim,
            target=None if is_pixels else size_of(teacher or encoder),
        )
    return total
