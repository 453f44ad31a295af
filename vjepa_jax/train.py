"""Pretrain a V-JEPA.

    python -m vjepa_jax.train --config=configs/world_tiny.py --workdir=DIR

The same command continues an interrupted run. DIR receives `config.json`,
`metrics.jsonl`, `tensorboard/`, `checkpoints/`, `bad_videos.jsonl`, `starts.jsonl` (the
hardware and versions of every start) and `shardings.txt`, how each array of the state
is spread over the devices (also logged at `--verbosity=1`); a trace in `profile/` where
one is asked for, `stacks_0.txt` where a step took too long.
`--config.evals.health.every_steps=500` evaluates the target encoder as it goes.
"""

import json
import pathlib
import sys
from collections.abc import Mapping

import jax
from absl import flags, logging

from vjepa_jax.base.errors import UserError
from vjepa_jax.config import rules
from vjepa_jax.config import saved as saved_config
from vjepa_jax.config.defaults import MAIN_STREAM, ConfigDict, flatten
from vjepa_jax.config.flags import define_config_flag
from vjepa_jax.data.stream import streams
from vjepa_jax.data.stream.bad_videos import REASONS
from vjepa_jax.evals.hook import EvaluationHook
from vjepa_jax.parallel import distributed, sharding
from vjepa_jax.program import build, compilation, flops
from vjepa_jax.program.program import make_program
from vjepa_jax.run import (
    checkpoint,
    cli,
    environment,
    fit,
    metrics,
    profiling,
    watchdog,
    workdirs,
)
from vjepa_jax.run.goodput import TimeAccount
from vjepa_jax.world import render

SHARDINGS_FILE = "shardings.txt"
# What hosts may have of their own; all else must be the same.
_PER_HOST = (".path", "data.num_workers", "data.prefetch_megabytes")
# Processes at the same point of the program may be apart by so much.
_WAIT_SECS = 600
_RENDER_TIMEOUT_SECS = 4 * 3600
_SLOW_SECS = 60  # from which a compilation is worth keeping


def _say(message: str) -> None:
    if distributed.is_main():
        print(message, file=sys.stderr, flush=True)


def _make_clock(program, start, account):
    config, mesh = program.config, program.mesh
    peak = flops.peak_flops(mesh.devices.flat[0].device_kind)
    clips = sum(build.batch_sizes(config).values())
    return metrics.StepClock(
        total_steps=config.total_steps,
        batch_size=clips,
        start_step=start,
        flops_per_clip=program.step_flops() / clips,
        peak_flops=peak and peak * mesh.size,
        account=account,
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
                    "the videos of config.data.path, or their shares in a mixture, are "
                    "not those that this run was reading: bring them back, give "
                    "another --workdir, or continue with the new ones by "
                    "--config.data.accept_change=True"
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
    # From the host, since arrays on a device do not move to other processes' devices.
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
    limit = compilation.memory_limit(program.mesh.local_mesh.devices.flat[0])
    room = f" of {limit / compilation.GIB:.2f} GiB" if limit else ""
    _say(f"compiled the step in {seconds:.0f} s; it takes {memory or 'unknown'}{room}")
    if seconds > _SLOW_SECS and not jax.config.jax_compilation_cache_dir:
        _say("config.compilation_cache=FOLDER would save that at the next start")
    return step_fn


def _write_shardings(program, folder: pathlib.Path) -> None:
    """Write `shardings.txt`, a line per array of the state."""
    lines = [str(decision) for decision in program.decisions]
    for line in lines:
        logging.vlog(1, line)
    if distributed.is_main():
        (folder / SHARDINGS_FILE).write_text("\n".join(lines) + "\n")


def train_and_evaluate(config: ConfigDict, workdir: str) -> int | None:
    """Run the config in `workdir` from its latest checkpoint to `total_steps`.

    Returns:
      The exit code of a run that was stopped early, None at its end.

    Raises:
      UserError: something that the user can mend; nothing was overwritten.
      LostProcess: the other processes of the run are not with this one.
    """
    account = TimeAccount()
    # ---------------------------------------------------------------- what to compute
    rules.validate(config)
    _require_same_config(config)
    mesh = sharding.make_mesh(**config.mesh)
    compilation.use_cache(config.compilation_cache)
    trained, teacher_params, teacher_step = _load_teacher(config)
    program = make_program(config, mesh, trained)
    # ----------------------------------------------------------- what to compute it on
    workdirs.check(config, workdir)
    if config.world.path and distributed.is_main():
        render.render_world(config.world)
    distributed.barrier("the world is rendered", _RENDER_TIMEOUT_SECS)
    opened = streams.open_sources(config)
    evaluations = EvaluationHook(program, opened[MAIN_STREAM])
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
        sharding.use(mesh),
        checkpoint.Checkpointer(workdir, **config.checkpoint) as checkpointer,
        compilation.explain_out_of_memory(config, mesh),
        distributed.StopRequest() as stop,
        workdirs.LocalFiles(workdir, fetched="*.jsonl") as files,
    ):
        start, state = _restore_or_init(
            checkpointer, program, fingerprint, teacher_step
        )
        if start >= config.total_steps:
            _say(f"nothing to do: {workdir} is at step {start}, the end of the run")
            return None
        extra = _put_teacher(program, teacher_params)
        with account.measure("compile"):
            step_fn = _compile(program)
        # Not before: a start that fails must not bind the workdir to its config.
        workdirs.claim(config, workdir)
        if distributed.is_main():
            environment.note_start(files.folder, start)
        _write_shardings(program, files.folder)
        earlier = _earlier_rows(files.folder)
        account.add_earlier(earlier, start)
        evaluations.add_earlier(earlier, start)
        with (
            streams.open_streams(
                config,
                opened,
                build.batch_sizes(config),
                start,
                str(files.folder),
                distributed.process_index(),
                distributed.process_count(),
            ) as batches,
            metrics.MetricWriter(
                files.folder, total_steps=config.total_steps, start_step=start
            ) as writer,
            profiling.ProfileWindow(files.folder, **config.profile) as profile,
            watchdog.Watchdog(files.folder, config.log.watchdog_secs) as dog,
        ):
            account.end_startup()
            most_in_row = config.optim.max_skipped_in_row
            skips = _SkipWatch(int(state.guard.skipped), most_in_row, checkpointer)
            clock = _make_clock(program, start, account)

            def draw():
                with clock.measure("data"):
                    return sharding.shard_batch(next(batches), mesh)

            def report(step, values):
                with clock.measure("step"):
                    values = {k: float(v) for k, v in jax.device_get(values).items()}
                skips.check(step, values)
                values |= clock.window(step) | metrics.memory_scalars()
                values |= _bad_videos(step, batches.bad_counts) | account.scalars()
                writer.write(step, values)
                checkpointer.check_errors()

            # ----------------------------------------------------------------- the loop
            # DO NOT REORDER: the next batch is read and moved while the device
            # computes; results are read after the device has been given new work; a
            # step's metrics are on disk before its checkpoint is, and its checkpoint
            # is under way before an evaluation, which may take long or end badly.
            batch, pending = draw(), None
            for step in range(start + 1, config.total_steps + 1):
                profile.begin(step)
                with (
                    clock.measure("step"),
                    jax.profiler.StepTraceAnnotation("train", step_num=step),
                ):
                    state, values = step_fn(state, batch, *extra)
                is_end = step == config.total_steps
                is_last = is_end or stop.is_agreed(step)
                profile.end(step, values)
                batch = None if is_last else draw()
                if pending is not None:
                    report(*pending)
                is_logged = step % config.log.every_steps == 0 or is_last
                pending = (step, values) if is_logged else None
                # Who stops a run need not wait for an evaluation.
                is_evaluated = evaluations.is_due(step) and (is_end or not is_last)
                is_saved = is_last or checkpointer.should_save(step)
                if pending is not None and (is_saved or is_evaluated):
                    report(*pending)
                    pending = None
                elif is_saved:
                    with clock.measure("step"):
                        values = jax.device_get(values)
                    skips.check(step, values)
                if is_saved:
                    with clock.measure("checkpoint"):
                        files.copy_back()
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
                if is_evaluated:
                    with clock.measure("evaluation"), dog.paused():
                        found = evaluations.run(step, state)
                    scalars = found.scalars | account.scalars()
                    writer.write(step, scalars, found.lines)
                    writer.write_images(step, found.images)
                dog.finished(step)
                if is_last:
                    break
            with account.measure("checkpoint"):
                checkpointer.wait()
    _say(account.summary())
    if step < config.total_steps:
        _say(f"stopped at step {step}, saved; the same command continues")
        return stop.exit_code
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


def _earlier_rows(folder: pathlib.Path) -> list[dict[str, float]]:
    """Return the metrics that the run wrote before it was interrupted."""
    path = folder / metrics.FILE
    return metrics.read_metrics(str(path)) if path.exists() else []


def _bad_videos(step: int, known: Mapping[str, int]) -> dict[str, int]:
    """Count the unreadable videos that all processes know of."""
    counts = distributed.sum_on_main(
        f"bad_videos/{step}", [known[r] for r in REASONS], _WAIT_SECS
    )
    of_reasons = zip(REASONS, counts, strict=True)
    return {"data/bad_videos": sum(counts)} | {
        f"data/bad_{reason}": count for reason, count in of_reasons if count
    }


def _require_same_config(config: ConfigDict) -> None:
    """Raise UserError where this process's config is not the first one's."""
    mine = json.dumps(config.to_dict())
    theirs = distributed.from_main("config", mine, _WAIT_SECS)
    mine, theirs = (flatten(json.loads(text)) for text in (mine, theirs))
    changed = [
        f"{key}: {theirs.get(key, 'absent')} there, {mine.get(key, 'absent')} here"
        for key in sorted(mine.keys() | theirs.keys())
        if mine.get(key) != theirs.get(key) and not key.endswith(_PER_HOST)
    ]
    if changed:
        raise UserError(
            f"process {distributed.process_index()} has another config than the first "
            f"one ({'; '.join(changed)}): give the same command to all"
        )


def main() -> None:
    """Run the command line."""
    checkpoint.quiet_orbax()
    distributed.initialize(**_CLUSTER())
    with distributed.ending_together(cli.EXIT_USER_ERROR):
        exit_code = train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    if exit_code is not None:
        sys.exit(exit_code)


if __name__ == "__main__":
    _CONFIG = define_config_flag()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)
    _CLUSTER = cli.define_cluster_flags()
    cli.run(main)
