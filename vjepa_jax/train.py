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
    build,
    checkpoint,
    cli,
    default_config,
    distributed,
    flops,
    metrics,
    optim,
    sharding,
)
from vjepa_jax.data import pipeline, render, sources
from vjepa_jax.default_config import UserError
from vjepa_jax.models.encoder import token_grid
from vjepa_jax.train_state import abstract_state, make_init
from vjepa_jax.train_step import Objective, Stream, make_train_step

CONFIG_FILE = "config.json"
STREAM = "video"


def check_workdir(config: ConfigDict, workdir: str) -> None:
    """Raise UserError if the workdir is none, or holds a run of another config."""
    path = pathlib.Path(workdir) / CONFIG_FILE
    if not path.exists():
        if path.parent.exists() and not path.parent.is_dir():
            raise UserError(f"--workdir={workdir} is not a folder: give another")
        return
    try:
        old = json.loads(path.read_text())
    except ValueError:
        raise UserError(f"{path} is not JSON: give another --workdir") from None
    changed = default_config.differences(old, config.to_dict())
    if changed:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}): give "
            "another --workdir, or the values of that run"
        )


def claim_workdir(config: ConfigDict, workdir: str) -> None:
    """Write `config.json`, whole or not at all."""
    if distributed.is_main():
        path = pathlib.Path(workdir) / CONFIG_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
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


def _make_clock(config, encoder, predictor, masks, grid, start, mesh):
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
        start_step=start,
        flops_per_clip=per_clip,
        peak_flops=peak and peak * mesh.size,
    )


def _restore_or_init(checkpointer, init, shapes, shardings, seed, fingerprint):
    """Return (finished steps, state), from the latest checkpoint or from scratch."""
    step = checkpointer.latest_step()
    if step is None:
        state = jax.jit(init, out_shardings=shardings)(jax.random.key(seed))
        return 0, nn.unbox(state)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
        shapes,
        shardings,
    )
    state, position, _ = checkpointer.restore(step, abstract)
    if position["fingerprint"] != fingerprint:
        raise UserError(
            "the videos of config.data.path are not those that this run was reading: "
            "bring them back, or give another --workdir"
        )
    _say(f"resumed from step {step}")
    return step, state


def _compile(train_step, state, batch_shape, shardings, mesh):
    began = time.perf_counter()
    batch = jax.ShapeDtypeStruct(
        batch_shape, "uint8", sharding=sharding.batch_sharding(mesh)
    )
    jitted = jax.jit(
        train_step,
        out_shardings=(shardings, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    step_fn = jitted.lower(state, {STREAM: {"video": batch}}).compile()
    _say(f"compiled the step in {time.perf_counter() - began:.0f} s")
    return step_fn


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
    encoder, predictor = build.make_models(config)
    data = config.data
    video_shape = (data.num_frames, data.resolution, data.resolution, 3)
    grid = token_grid(video_shape, encoder.patch_size, encoder.tubelet_size)
    masks = build.make_masks(config, grid)
    schedules = build.make_schedules(config)
    o = config.optim
    tx = optim.make_optimizer(
        schedules["learning_rate"],
        schedules["weight_decay"],
        o.b1,
        o.b2,
        o.eps,
        o.clip_norm,
    )
    init = make_init(encoder, predictor, tx, video_shape)
    shapes, shardings = abstract_state(init), sharding.state_shardings(init, mesh)
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
    # ----------------------------------------------------------- what to compute it on
    check_workdir(config, workdir)
    if config.world.path and distributed.is_main():
        render.render_world(config.world)
    distributed.barrier("rendered")
    source = sources.open_source(data.path)
    fingerprint = sources.fingerprint(source, **_sampling(data))
    claim_workdir(config, workdir)
    _say(
        f"{len(source)} videos; {config.model.encoder.size} encoder on {grid} tokens; "
        f"{sharding.describe(shapes, shardings)}; mesh {dict(mesh.shape)}"
    )
    with (
        jax.set_mesh(mesh),
        nn.logical_axis_rules(sharding.RULES),
        checkpoint.Checkpointer(workdir, **config.checkpoint) as checkpointer,
        _StopRequest() as stop,
    ):
        start, state = _restore_or_init(
            checkpointer, init, shapes, shardings, config.seed, fingerprint
        )
        if start >= config.total_steps:
            _say(f"nothing to do: {workdir} is at step {start}, the end of the run")
            return None
        step_fn = _compile(
            train_step, state, (config.batch_size, *video_shape), shardings, mesh
        )
        began -= _earlier_seconds(workdir)
        with (
            pipeline.make_train_iterator(
                source,
                batch_size=config.batch_size,
                seed=config.seed,
                start_step=start,
                process_index=distributed.process_index(),
                process_count=distributed.process_count(),
                bad_videos_path=_bad_videos_path(workdir),
                **{key: value for key, value in data.items() if key != "path"},
            ) as batches,
            metrics.MetricWriter(
                workdir, total_steps=config.total_steps, start_step=start
            ) as writer,
        ):
            clock = _make_clock(config, encoder, predictor, masks, grid, start, mesh)

            def draw():
                with clock.measure("data"):
                    return sharding.shard_batch(next(batches), mesh)

            def report(step, values):
                with clock.measure("step"):
                    values = {k: float(v) for k, v in jax.device_get(values).items()}
                _require_finite(step, values, checkpointer)
                values |= clock.window(step) | metrics.memory_scalars()
                values["data/bad_videos"] = batches.bad_count
                values["perf/wall_seconds"] = time.perf_counter() - began
                writer.write(step, values)
                checkpointer.check_errors()

            # ----------------------------------------------------------------- the loop
            # DO NOT REORDER: the next batch is read and moved while the device
            # computes; results are read after the device has been given new work; and
            # a step's metrics are on disk before its checkpoint is.
            batch, pending = draw(), None
            for step in range(start + 1, config.total_steps + 1):
                with (
                    clock.measure("step"),
                    jax.profiler.StepTraceAnnotation("train", step_num=step),
                ):
                    state, values = step_fn(state, batch)
                is_last = step == config.total_steps or stop.signal is not None
                batch = None if is_last else draw()
                if pending is not None:
                    report(*pending)
                is_logged = step % config.log.every_steps == 0 or is_last
                pending = (step, values) if is_logged else None
                if is_last or checkpointer.should_save(step):
                    if pending is not None:
                        report(*pending)
                        pending = None
                    else:
                        _require_finite(step, jax.device_get(values), checkpointer)
                    with clock.measure("checkpoint"):
                        checkpointer.save(
                            step,
                            state,
                            data={"step": step, "fingerprint": fingerprint},
                            meta={
                                "config": config.to_dict(),
                                "video_shape": video_shape,
                            },
                            force=is_last,
                        )
                if is_last:
                    break
            checkpointer.wait()
    if step < config.total_steps:
        _say(f"stopped at step {step}, saved; the same command continues")
        return stop.signal
    _say(f"finished at step {step}; checkpoints in {workdir}/{checkpoint.FOLDER}")
    return None


def _require_finite(step: int, values, checkpointer) -> None:
    """Refuse to go on, or to save, after a step that has ruined the parameters."""
    keys = ("train/loss", "optim/grad_norm_encoder", "optim/grad_norm_predictor")
    if not all(math.isfinite(values[key]) for key in keys):
        raise UserError(
            f"loss or gradient is not finite at step {step}; the last checkpoint is "
            f"{checkpointer.latest_step()}: lower config.optim.learning_rate or clip "
            "the gradient (config.optim.clip_norm) in a new --workdir"
        )


def _sampling(data: ConfigDict) -> dict[str, object]:
    """Return the settings that decide which clips a step sees."""
    operational = default_config.OPERATIONAL
    return {k: v for k, v in data.items() if not f"data.{k}".startswith(operational)}


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
