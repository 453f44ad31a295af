"""Pretrain a V-JEPA.

    python -m vjepa_jax.train --config=configs/world_tiny.py --workdir=DIR

The same command continues an interrupted run. DIR receives `config.json`,
`metrics.jsonl`, `tensorboard/`, `checkpoints/`, `bad_videos.jsonl` and `shardings.txt`,
how each array of the state is spread over the devices (also logged at `--verbosity=1`).
"""

import json
import pathlib
import signal
import sys
import time

import flax.linen as nn
import jax
from absl import flags, logging

from vjepa_jax import (
    build,
    checkpoint,
    cli,
    compilation,
    default_config,
    distributed,
    fit,
    flops,
    metrics,
    saved_config,
    sharding,
)
from vjepa_jax.data import render, streams
from vjepa_jax.default_config import MAIN_STREAM, ConfigDict, UserError
from vjepa_jax.program import make_program

CONFIG_FILE = "config.json"
SHARDINGS_FILE = "shardings.txt"
_SLOW_SECS = 60  # from which a compilation is worth keeping


def check_workdir(config: ConfigDict, workdir: str) -> None:
    """Raise UserError if the workdir is none, or holds a run of another config."""
    path = pathlib.Path(workdir) / CONFIG_FILE
    if not path.exists():
        if path.parent.exists() and not path.parent.is_dir():
            raise UserError(f"--workdir={workdir} is not a folder: give another")
        return
    try:
        old = saved_config.restored(json.loads(path.read_text())).to_dict()
    except (ValueError, TypeError, AttributeError, KeyError):
        raise UserError(f"{path} is no config: give another --workdir") from None
    changed = saved_config.differences(old, config.to_dict())
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


def _make_clock(program, start):
    config, mesh = program.config, program.mesh
    peak = flops.peak_flops(mesh.devices.flat[0].device_kind)
    clips = sum(build.batch_sizes(config).values())
    per_step = build.step_flops(
        config, program.encoder, program.predictor, program.streams, program.teacher
    )
    return metrics.StepClock(
        total_steps=config.total_steps,
        batch_size=clips,
        start_step=start,
        flops_per_clip=per_step / clips,
        peak_flops=peak and peak * mesh.size,
    )


def _restore_or_init(checkpointer, program, fingerprint, teacher_step):
    """Return (finished steps, state): the run's own, another's, or a new one."""
    config, abstract = program.config, program.abstract_state()
    step = checkpointer.latest_step()
    if step is not None:
        state, position, meta = checkpointer.restore(step, abstract)
        if position["fingerprint"] != fingerprint:
            if not config.data.accept_change:
                raise UserError(
                    "the videos of config.data.path are not those that this run was "
                    "reading: bring them back, give another --workdir, or continue "
                    "with the new ones by --config.data.accept_change=True"
                )
            _say(f"other videos than before, from step {step} on")
        if meta.get("teacher_step", teacher_step) != teacher_step:
            raise UserError(
                f"this run learns from step {meta['teacher_step']} of "
                f"{config.teacher.path}, which is at step {teacher_step} now: set "
                f"config.teacher.step={meta['teacher_step']}"
            )
        _say(f"resumed from step {step}")
        return step, state
    state = program.make_state()
    if config.init.path:
        step, taken = checkpoint.restore_start(
            config.init.path, abstract, config.init.keep_moments
        )
        state = state.replace(**taken)
        _say(f"starting from step {step} of {config.init.path}")
    return 0, state


def _load_teacher(config):
    """Return the teacher's config, parameters (on the host) and step; or Nones."""
    if not config.teacher.path:
        return None, None, None
    wanted = None if config.teacher.step < 0 else config.teacher.step
    params, meta = checkpoint.restore_target(config.teacher.path, wanted)
    if "config" not in meta:
        raise UserError(
            f"config.teacher.path={config.teacher.path} holds no encoder of a run or "
            "of a conversion: give another"
        )
    trained = saved_config.restored(meta["config"])
    return trained, jax.device_get(params), meta["step"]


def _put_teacher(program, params):
    """Return what the step gets besides state and batch: the teacher's parameters."""
    if program.teacher is None:
        return ()
    abstract = program.teacher_params
    fit.require_fit(program.config.teacher.path, stored=params, wanted=abstract)
    return (jax.device_put(params, jax.tree.map(lambda x: x.sharding, abstract)),)


def _compile(program):
    step_fn, seconds = compilation.compile_step(program.lower())
    memory = compilation.memory_of(step_fn)
    limit = compilation.memory_limit(program.mesh.devices.flat[0])
    room = f" of {limit / compilation.GIB:.2f} GiB" if limit else ""
    _say(f"compiled the step in {seconds:.0f} s; it takes {memory or 'unknown'}{room}")
    if seconds > _SLOW_SECS and not jax.config.jax_compilation_cache_dir:
        _say("config.compilation_cache=FOLDER would save that at the next start")
    return step_fn


def _write_shardings(program, workdir: str) -> None:
    """Write `shardings.txt`, a line per array of the state."""
    lines = [str(decision) for decision in program.decisions]
    for line in lines:
        logging.vlog(1, line)
    if distributed.is_main():
        path = pathlib.Path(workdir) / SHARDINGS_FILE
        path.write_text("\n".join(lines) + "\n")


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
    compilation.use_cache(config.compilation_cache)
    trained, teacher_params, teacher_step = _load_teacher(config)
    program = make_program(config, mesh, trained)
    # ----------------------------------------------------------- what to compute it on
    check_workdir(config, workdir)
    if config.world.path and distributed.is_main():
        render.render_world(config.world)
    distributed.barrier("rendered")
    opened = streams.open_sources(config)
    fingerprint = streams.fingerprint(config, opened)
    counts = ", ".join(f"{len(s)} {name}" for name, s in opened.items())
    clip_shape = build.video_shapes(config)[MAIN_STREAM]
    grid = program.encoder.grid(clip_shape)
    _say(
        f"{counts} clips; {config.model.encoder.size} encoder on {grid} tokens; "
        f"{sharding.describe(program.decisions)}; "
        f"mesh {dict(mesh.shape)}\n"
        f"{build.describe_schedules(config)}"
    )
    with (
        jax.set_mesh(mesh),
        nn.logical_axis_rules(sharding.RULES),
        checkpoint.Checkpointer(workdir, **config.checkpoint) as checkpointer,
        compilation.explain_out_of_memory(config, mesh),
        _StopRequest() as stop,
    ):
        start, state = _restore_or_init(
            checkpointer, program, fingerprint, teacher_step
        )
        # Not before: a start that fails must not bind the workdir to its config.
        claim_workdir(config, workdir)
        _write_shardings(program, workdir)
        if start >= config.total_steps:
            _say(f"nothing to do: {workdir} is at step {start}, the end of the run")
            return None
        extra = _put_teacher(program, teacher_params)
        step_fn = _compile(program)
        began -= _earlier_seconds(workdir)
        with (
            streams.open_streams(
                config,
                opened,
                build.batch_sizes(config),
                start,
                workdir,
                distributed.process_index(),
                distributed.process_count(),
            ) as batches,
            metrics.MetricWriter(
                workdir, total_steps=config.total_steps, start_step=start
            ) as writer,
        ):
            most_in_row = config.optim.max_skipped_in_row
            skips = _SkipWatch(int(state.guard.skipped), most_in_row, checkpointer)
            clock = _make_clock(program, start)

            def draw():
                with clock.measure("data"):
                    return sharding.shard_batch(next(batches), mesh)

            def report(step, values):
                with clock.measure("step"):
                    values = {k: float(v) for k, v in jax.device_get(values).items()}
                skips.check(step, values)
                values |= clock.window(step) | metrics.memory_scalars()
                bad = batches.bad_counts
                values["data/bad_videos"] = sum(bad.values())
                values |= {f"data/bad_{reason}": n for reason, n in bad.items()}
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
                    state, values = step_fn(state, batch, *extra)
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
                        values = jax.device_get(values)
                        skips.check(step, values)
                    with clock.measure("checkpoint"):
                        checkpointer.save(
                            step,
                            state,
                            data={"step": step, "fingerprint": fingerprint},
                            meta={
                                "config": config.to_dict(),
                                "video_shape": clip_shape,
                                "teacher_step": teacher_step,
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


class _SkipWatch:
    """Tells of skipped updates; ends the run when none is taken any more."""

    def __init__(self, skipped: int, most_in_row: int, checkpointer):
        self._skipped, self._most_in_row = skipped, most_in_row
        self._checkpointer = checkpointer

    def check(self, step: int, values) -> None:
        """Look at a step's metrics, of which some may never have been seen."""
        skipped = int(values["optim/skipped"])
        in_row = int(values["optim/skipped_in_row"])
        most = int(values["optim/most_skipped_in_row"])
        if most >= self._most_in_row:
            last = self._checkpointer.latest_step()
            saved = "nothing was saved" if last is None else f"step {last} is saved"
            raise UserError(
                f"loss or gradient is not finite, or the loss a spike, in {most} "
                f"steps in a row, up to step {step}; {saved}: "
                "lower config.optim.learning_rate or clip the gradient "
                "(config.optim.clip_norm) in a new --workdir"
            )
        if skipped > self._skipped:
            _say(
                f"skipped updates: {skipped - self._skipped} more up to step {step}, "
                f"{in_row} in a row now: loss or gradient not finite, or a spike"
            )
        self._skipped = skipped


def _earlier_seconds(workdir: str) -> float:
    """Return the wall time that the run took before it was interrupted."""
    path = pathlib.Path(workdir) / metrics.FILE
    rows = metrics.read_metrics(str(path)) if path.exists() else []
    return rows[-1]["perf/wall_seconds"] if rows else 0.0


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
