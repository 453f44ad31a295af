"""Pretrain a V-JEPA.

    python -m vjepa_jax.train --config=configs/world_tiny.py --workdir=DIR

The same command continues an interrupted run. The workdir receives `config.json`,
`metrics.jsonl`, `tensorboard/`, `checkpoints/`, `bad_videos.jsonl`, `starts.jsonl`
(hardware and versions of every start), `shardings.txt` (how each array of the state is
sharded; also logged at `--verbosity=1`), `profile/` with a trace if one is requested,
and `stacks_0.txt` if a step took too long.
`--config.evals.health.every_steps=500` evaluates the target encoder during training.
"""

import sys

import jax
from absl import flags

from vjepa_jax.config import rules
from vjepa_jax.config.defaults import MAIN_STREAM, ConfigDict
from vjepa_jax.config.flags import define_config_flag
from vjepa_jax.data.stream import streams
from vjepa_jax.evals.hook import EvaluationHook
from vjepa_jax.parallel import distributed, sharding
from vjepa_jax.parallel.distributed import print_on_main
from vjepa_jax.program import build, compilation, flops
from vjepa_jax.run import checkpoint, cli, metrics, start, watch, workdirs
from vjepa_jax.run.goodput import TimeAccount
from vjepa_jax.world import render

_RENDER_TIMEOUT_SECS = 4 * 3600


def train_and_evaluate(config: ConfigDict, workdir: str) -> int | None:
    """Run the config in `workdir` from its latest checkpoint to `total_steps`.

    Returns:
      The exit code of a run that was stopped early, None at its end.

    Raises:
      UserError: an error that the user can fix; nothing was overwritten.
      LostProcess: other processes of the run ended or do not respond.
    """
    account = TimeAccount()
    rules.validate(config)
    workdirs.require_same_config(config)
    # --------------------------------------------------------------------------- mesh
    mesh = sharding.make_mesh(**config.mesh)
    compilation.use_cache(config.compilation_cache)
    # --------------- models, objective, schedules, optimiser, initial state, step
    teacher = start.load_teacher(config)
    program = build.make_program(config, mesh, teacher.config)
    # --------------------------------------------------------------------------- data
    workdirs.require_no_other_run(config, workdir)
    if config.world.path and distributed.is_main():
        render.render_world(config.world)
    distributed.barrier("the world is rendered", _RENDER_TIMEOUT_SECS)
    sources = streams.open_sources(config)
    fingerprint = streams.fingerprint(config, sources)
    evaluations = EvaluationHook(program, sources[MAIN_STREAM])
    counts = ", ".join(f"{len(s)} {name}" for name, s in sources.items())
    print_on_main(f"{counts} clips; {program.summary}")
    with (
        sharding.use(mesh),
        checkpoint.Checkpointer(workdir, **config.checkpoint) as checkpointer,
        compilation.explain_out_of_memory(config, mesh),
        distributed.StopRequest() as stop,
        workdirs.LocalFiles(workdir, fetched="*.jsonl") as files,
    ):
        # ----------------------------------------------------------------------- state
        first, state = start.restore_or_init(
            checkpointer, program, fingerprint, teacher.step
        )
        if first >= config.total_steps:
            print_on_main(
                f"nothing to do: {workdir} is at step {first}, the end of the run"
            )
            return None
        frozen = start.put_teacher(program, teacher)
        with account.measure("compile"):
            step_fn = start.compile_step(program)
        # Only now, so that a start that fails does not bind the workdir to its config.
        workdirs.claim(config, workdir)
        if distributed.is_main():
            workdirs.log_start(files.folder, first)
        workdirs.write_shardings(files.folder, program.decisions)
        earlier = metrics.earlier_rows(files.folder)
        account.add_earlier(earlier, first)
        evaluations.add_earlier(earlier, first)
        with (
            streams.open_streams(
                config,
                sources,
                program.batch_sizes,
                first,
                str(files.folder),
            ) as batches,
            metrics.MetricWriter(
                files.folder, total_steps=config.total_steps, start_step=first
            ) as writer,
            watch.ProfileWindow(files.folder, **config.profile) as profile,
            watch.Watchdog(files.folder, config.log.watchdog_secs) as watchdog,
        ):
            account.end_startup()
            skips = watch.SkipWatch(
                int(state.guard.skipped), config.optim.max_skipped_in_row, checkpointer
            )
            peak = flops.peak_flops(mesh.devices.flat[0].device_kind)
            clock = metrics.StepClock(
                account,
                total_steps=config.total_steps,
                batch_size=program.num_clips,
                start_step=first,
                flops_per_clip=program.step_flops / program.num_clips,
                peak_flops=peak and peak * mesh.size,
            )

            def draw():
                with account.measure("data"):
                    return sharding.shard_batch(next(batches), mesh)

            def report(step, values):
                with account.measure("step"):
                    values = {k: float(v) for k, v in jax.device_get(values).items()}
                skips.check(step, values)
                values |= clock.window(step) | metrics.memory_scalars()
                values |= metrics.bad_video_scalars(step, batches.bad_counts)
                writer.write(step, values | account.scalars())
                checkpointer.check_errors()

            def save(step, state, is_last):
                with account.measure("checkpoint"):
                    files.copy_back()
                    meta = {
                        "config": config.to_dict(),
                        "video_shape": program.video_shapes[MAIN_STREAM],
                        "teacher_step": teacher.step,
                        "probe_item": program.objective.probe_item,
                    }
                    position = {"step": step, "fingerprint": fingerprint}
                    checkpointer.save(step, state, position, meta, force=is_last)

            def evaluate(step, state):
                with account.measure("evaluation"), watchdog.paused():
                    found = evaluations.run(step, state)
                writer.write(step, found.scalars | account.scalars(), found.lines)
                writer.write_images(step, found.images)

            # -------------------------------------------------------------------- loop
            # DO NOT REORDER: the next batch is read and moved while the device
            # computes; results are read after the device has been given new work; a
            # step's metrics are on disk before its checkpoint is, and its checkpoint
            # is under way before an evaluation, which may take long or fail.
            batch, pending = draw(), None
            for step in range(first + 1, config.total_steps + 1):
                profile.begin(step)
                with (
                    account.measure("step"),
                    jax.profiler.StepTraceAnnotation("train", step_num=step),
                ):
                    state, values = step_fn(state, batch, *frozen)
                is_end = step == config.total_steps
                is_last = is_end or stop.is_agreed(step)
                profile.end(step, values)
                batch = None if is_last else draw()
                if pending is not None:
                    report(*pending)
                is_logged = step % config.log.every_steps == 0 or is_last
                pending = (step, values) if is_logged else None
                # A run that is asked to stop does not evaluate first.
                is_evaluated = evaluations.is_due(step) and (is_end or not is_last)
                is_saved = is_last or checkpointer.should_save(step)
                if pending is not None and (is_saved or is_evaluated):
                    report(*pending)
                    pending = None
                elif is_saved:
                    with account.measure("step"):
                        values = jax.device_get(values)
                    skips.check(step, values)
                if is_saved:
                    save(step, state, is_last)
                if is_evaluated:
                    evaluate(step, state)
                watchdog.finished(step)
                if is_last:
                    break
            with account.measure("checkpoint"):
                checkpointer.wait()
    print_on_main(account.summary())
    if step < config.total_steps:
        print_on_main(f"stopped at step {step}, saved; the same command continues")
        return stop.exit_code
    print_on_main(
        f"finished at step {step}; checkpoints in {workdir}/{checkpoint.FOLDER}"
    )
    return None


def main() -> None:
    """Run the command line."""
    checkpoint.quiet_orbax()
    distributed.initialize(**_CLUSTER())
    with distributed.exit_on_error(cli.EXIT_USER_ERROR):
        exit_code = train_and_evaluate(_CONFIG.value, _WORKDIR.value)
    if exit_code is not None:
        sys.exit(exit_code)


if __name__ == "__main__":
    _CONFIG = define_config_flag()
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run", required=True)
    _CLUSTER = cli.define_cluster_flags()
    cli.run(main)
