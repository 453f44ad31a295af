"""Pretrain a V-JEPA.

    python -m vjepa_jax.train --config=configs/world_tiny.py --workdir=DIR

The same command continues an interrupted run. DIR receives `config.json`,
`metrics.jsonl`, `tensorboard/`, `checkpoints/` and `bad_videos.jsonl`.
"""

import json
import math
import os
import pathlib
import signal
import sys
import time

import flax.linen as nn
import jax
from absl import flags
from ml_collections import ConfigDict

from vjepa_jax import (
    checkpoint,
    cli,
    default_config,
    distributed,
    flops,
    masking,
    metrics,
    optim,
    sharding,
)
from vjepa_jax.data import pipeline, prepare, sources
from vjepa_jax.default_config import UserError
from vjepa_jax.models import registry
from vjepa_jax.models.encoder import token_grid
from vjepa_jax.train_state import abstract_state, make_init
from vjepa_jax.train_step import Objective, Stream, make_train_step

CONFIG_FILE = "config.json"
STREAM = "video"


def make_models(config: ConfigDict):
    """Make encoder and predictor as the config says."""
    model = config.model
    shared = {
        key: model[key]
        for key in ("pos_embed", "scan_layers", "remat", "attention", "dtype")
    }
    try:
        encoder = registry.make_encoder(**model.encoder, **shared)
    except ValueError as error:
        raise UserError(f"config.model.encoder.size: {error}") from None
    predictor = registry.make_predictor(
        **model.predictor,
        **shared,
        out_dim=encoder.width,
        num_mask_tokens=len(config.masks),
    )
    return encoder, predictor


def make_masks(config: ConfigDict, grid: masking.Grid) -> dict[str, masking.MaskSpec]:
    """Make the mask types with their token budgets filled in.

    Raises:
      UserError: a budget does not fit the grid.
    """
    specs = {}
    for name, fields in config.masks.items():
        fields = dict(fields)
        group_size = fields.pop("group_size")
        spec = masking.MaskSpec(**fields)
        context, target = masking.default_budget(spec, grid, group_size)
        context, target = spec.num_context or context, spec.num_target or target
        if context + target > math.prod(grid):
            raise UserError(
                f"config.masks.{name}: num_context={context} and num_target={target} "
                f"exceed the clip's {math.prod(grid)} tokens: lower one of them"
            )
        fields |= {"num_context": context, "num_target": target}
        specs[name] = masking.MaskSpec(**fields)
    return specs


def make_schedules(config: ConfigDict) -> dict[str, optim.Schedule]:
    """Make the schedules of learning rate, weight decay and EMA momentum."""
    o, steps = config.optim, int(config.optim.schedule_scale * config.total_steps)
    return {
        "learning_rate": optim.warmup_cosine(
            o.start_learning_rate,
            o.learning_rate,
            o.final_learning_rate,
            o.warmup_steps,
            steps,
        ),
        "weight_decay": optim.cosine(o.weight_decay, o.final_weight_decay, steps),
        "ema_momentum": optim.linear(config.ema.start, config.ema.end, steps),
    }


def claim_workdir(config: ConfigDict, workdir: str) -> None:
    """Write `config.json`, or check that the run there is this one.

    Raises:
      UserError: the workdir holds a run that computes something else.
    """
    path = pathlib.Path(workdir) / CONFIG_FILE
    if path.exists():
        try:
            old = json.loads(path.read_text())
        except ValueError:
            raise UserError(f"{path} is not JSON: use another --workdir") from None
        changed = default_config.differences(old, config.to_dict())
        if changed:
            raise UserError(
                f"{workdir} holds a run of another config ({'; '.join(changed)}): give "
                "another --workdir, or the values of that run"
            )
    if distributed.is_main():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise UserError(f"--workdir={workdir} is not a folder") from None
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
        temporary.replace(path)


class _StopRequest:
    """Turns the first Ctrl-C or SIGTERM into a checkpoint; a second ends at once."""

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self) -> "_StopRequest":
        self._old = {
            s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number, _) -> None:
        self.signal = number
        signal.signal(number, self._old[number])


def _say(message: str) -> None:
    if distributed.is_main():
        print(message, file=sys.stderr, flush=True)


def _make_clock(config, encoder, predictor, masks, grid, start_step, mesh):
    def size_of(module):
        return flops.Transformer(module.depth, module.width, module.mlp_dim)

    model = config.model.encoder
    per_clip = flops.train_step_flops(
        size_of(encoder),
        size_of(predictor),
        num_tokens=math.prod(grid),
        patch_dim=model.tubelet_size * model.patch_size**2 * 3,
        masks=[(m.num_context, m.num_target) for m in masks.values()],
    )
    peak = flops.peak_flops(mesh.devices.flat[0].device_kind)
    return metrics.StepClock(
        total_steps=config.total_steps,
        batch_size=config.batch_size,
        start_step=start_step,
        flops_per_clip=per_clip,
        peak_flops=peak and peak * mesh.size,
    )


def train_and_evaluate(config: ConfigDict, workdir: str) -> int | None:
    """Run the config in `workdir` from its latest checkpoint to `total_steps`.

    Returns:
      The signal that stopped the run early, None at its end.

    Raises:
      UserError: something that the user can mend; nothing was overwritten.
    """
    began = time.perf_counter()
    # ---------------------------------------------------------------- what to compute
    default_config.validate(config)
    distributed.initialize()
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_divides(mesh, config.batch_size, config.accumulate_steps)
    encoder, predictor = make_models(config)
    data = config.data
    video_shape = (data.num_frames, data.resolution, data.resolution, 3)
    grid = token_grid(video_shape, encoder.patch_size, encoder.tubelet_size)
    masks = make_masks(config, grid)
    schedules = make_schedules(config)
    o = config.optim
    tx = optim.make_optimizer(
        schedules["learning_rate"],
        schedules["weight_decay"],
        o.b1,
        o.b2,
        o.eps,
        o.clip_norm,
    )
    # ----------------------------------------------------------------------- the data
    claim_workdir(config, workdir)
    if config.world.path and distributed.is_main():
        prepare.render_world(config.world)
    source = sources.open_source(data.path)
    sampling = {
        key: value
        for key, value in data.items()
        if f"data.{key}" not in default_config.OPERATIONAL
    }
    fingerprint = sources.fingerprint(source, **sampling)
    # ------------------------------------------- state: shapes, shardings, then arrays
    init = make_init(encoder, predictor, tx, video_shape)
    shapes, shardings = abstract_state(init), sharding.state_shardings(init, mesh)
    _say(
        f"{len(source)} videos; {config.model.encoder.size} encoder on {grid} tokens; "
        f"{sharding.describe(shapes, shardings)}; mesh {dict(mesh.shape)}"
    )
    meta = {"config": config.to_dict(), "video_shape": video_shape}
    with (
        jax.set_mesh(mesh),
        nn.logical_axis_rules(sharding.RULES),
        checkpoint.Checkpointer(workdir, **config.checkpoint) as checkpointer,
        _StopRequest() as stop,
    ):
        start = checkpointer.latest_step()
        if start is None:
            start = 0
            state = nn.unbox(
                jax.jit(init, out_shardings=shardings)(jax.random.key(config.seed))
            )
        else:
            abstract = jax.tree.map(
                lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
                shapes,
                shardings,
            )
            state, position, _ = checkpointer.restore(start, abstract)
            if position["fingerprint"] != fingerprint:
                raise UserError(
                    f"the videos of data.path={data.path} are not those that the run "
                    f"in {workdir} was reading: restore them, or give another --workdir"
                )
            _say(f"resumed {workdir} from step {start}")
        if start >= config.total_steps:
            _say(f"nothing to do: {workdir} is at step {start}, the end of the run")
            return None
        # --------------------------------------------------------- the step, compiled
        train_step = make_train_step(
            encoder,
            predictor,
            tx,
            schedules,
            {STREAM: Stream(masks)},
            Objective(**config.objective),
            config.seed,
            config.accumulate_steps,
        )
        batch_shape = jax.ShapeDtypeStruct(
            (config.batch_size, *video_shape),
            "uint8",
            sharding=sharding.batch_sharding(mesh),
        )
        compile_began = time.perf_counter()
        step_fn = (
            jax.jit(
                train_step,
                out_shardings=(shardings, sharding.replicated(mesh)),
                donate_argnums=0,
            )
            .lower(state, {STREAM: {"video": batch_shape}})
            .compile()
        )
        _say(f"compiled the step in {time.perf_counter() - compile_began:.0f} s")
        # ------------------------------------------------------------------- the loop
        with (
            pipeline.make_train_iterator(
                source,
                batch_size=config.batch_size,
                seed=config.seed,
                start_step=start,
                process_index=distributed.process_index(),
                process_count=distributed.process_count(),
                bad_videos_path=_bad_videos_path(workdir),
                **{k: v for k, v in data.items() if k != "path"},
            ) as batches,
            metrics.MetricWriter(
                workdir, total_steps=config.total_steps, start_step=start
            ) as writer,
        ):
            clock = _make_clock(config, encoder, predictor, masks, grid, start, mesh)
            began -= _earlier_seconds(workdir)
            pending = None  # (step, metrics on the device), read one step late

            def draw():
                with clock.measure("data"):
                    return sharding.shard_batch(next(batches), mesh)

            def flush():
                nonlocal pending
                if pending is None:
                    return
                step, values = pending
                with clock.measure("step"):
                    values = {k: float(v) for k, v in jax.device_get(values).items()}
                if not math.isfinite(values["train/loss"]):
                    raise UserError(
                        f"the loss is not finite at step {step}; the latest checkpoint "
                        f"is step {checkpointer.latest_step()}: lower "
                        "optim.learning_rate or clip the gradient (optim.clip_norm)"
                    )
                values |= clock.window(step) | metrics.memory_scalars()
                values["data/bad_videos"] = batches.bad_count
                values["perf/wall_seconds"] = time.perf_counter() - began
                writer.write(step, values)
                checkpointer.check_errors()
                pending = None

            batch = draw()
            for step in range(start + 1, config.total_steps + 1):
                with (
                    clock.measure("step"),
                    jax.profiler.StepTraceAnnotation("train", step_num=step),
                ):
                    state, values = step_fn(state, batch)
                is_last = step == config.total_steps or stop.signal is not None
                # DO NOT REORDER: the next batch is decoded and moved while the device
                # computes; results are read after it has been given new work; a step's
                # metrics are on disk before its checkpoint is.
                batch = None if is_last else draw()
                flush()
                if step % config.log.every_steps == 0 or is_last:
                    pending = (step, values)
                if is_last or checkpointer.should_save(step):
                    flush()
                    with clock.measure("checkpoint"):
                        position = {"step": step, "fingerprint": fingerprint}
                        checkpointer.save(step, state, position, meta, force=is_last)
                if is_last:
                    break
            checkpointer.wait()
    if step < config.total_steps:
        _say(f"stopped at step {step}, saved; the same command continues")
        return stop.signal
    _say(f"finished at step {step}; checkpoints in {workdir}/{checkpoint.FOLDER}")
    return None


def _earlier_seconds(workdir: str) -> float:
    """Return the wall time that the run took before it was interrupted."""
    path = pathlib.Path(workdir) / metrics.FILE
    rows = metrics.read_metrics(str(path)) if path.exists() else []
    return rows[-1]["perf/wall_seconds"] if rows else 0.0


def _bad_videos_path(workdir: str) -> str:
    rank = distributed.process_index()
    return os.path.join(workdir, f"bad_videos{f'_{rank}' if rank else ''}.jsonl")


def main() -> None:
    """Run the command line."""
    checkpoint.quiet_orbax()
    signal_number = train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    if signal_number is not None:
        sys.exit(128 + signal_number)


if __name__ == "__main__":
    _CONFIG = cli.define_config_flag()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)
    cli.run(main)
