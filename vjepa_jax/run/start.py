"""Start a run: load its teacher, restore or initialise its state, compile its step."""

from typing import Any, NamedTuple

import jax

from vjepa_jax.base.errors import UserError
from vjepa_jax.config import saved
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.objective.state import TrainState
from vjepa_jax.parallel import distributed
from vjepa_jax.program import compilation
from vjepa_jax.program.build import Program
from vjepa_jax.run import checkpoint
from vjepa_jax.run.checkpoint_step import require_fit

_SLOW_SECS = 60  # for shorter compilations no hint about the cache is printed


class Teacher(NamedTuple):
    """A trained encoder whose features a run predicts; without one all are None.

    Attributes:
      config: of its training.
      params: its parameters, on the host.
      step: of its checkpoint.
    """

    config: ConfigDict | None = None
    params: Any = None
    step: int | None = None


def load_teacher(config: ConfigDict) -> Teacher:
    """Read the teacher at `config.teacher.path`, if there is one.

    Raises:
      UserError: its checkpoint cannot be used.
    """
    if not config.teacher.path:
        return Teacher()
    step = None if config.teacher.step < 0 else config.teacher.step
    params, meta = checkpoint.restore_target(
        config.teacher.path, step, option="config.teacher.step"
    )
    if "config" not in meta:
        raise UserError(
            f"config.teacher.path={config.teacher.path} has no encoder of a run or of "
            "a conversion: give another"
        )
    # On the host, since arrays do not move to devices of other processes.
    return Teacher(saved.restored(meta["config"]), jax.device_get(params), meta["step"])


def put_teacher(program: Program, teacher: Teacher) -> tuple[Any, ...]:
    """Put the teacher's parameters on the mesh.

    Returns:
      The arguments of the step after state and batch.

    Raises:
      UserError: the parameters do not fit the program.
    """
    if program.frozen is None:
        return ()
    path = program.config.teacher.path
    require_fit(path, stored=teacher.params, wanted=program.frozen)
    shardings = jax.tree.map(lambda x: x.sharding, program.frozen)
    return (jax.device_put(teacher.params, shardings),)


def restore_or_init(
    checkpointer: checkpoint.Checkpointer,
    program: Program,
    fingerprint: str,
    teacher_step: int | None,
) -> tuple[int, TrainState]:
    """Return the state from which the run continues or starts.

    Args:
      checkpointer: of the run's workdir.
      program: of the run.
      fingerprint: of the videos.
      teacher_step: of the teacher's checkpoint.

    Returns:
      (finished steps, state): from the run's own checkpoint, from that of
      `config.init.path`, or newly initialised.

    Raises:
      UserError: a checkpoint is damaged, or does not fit the model, the data or the
        teacher.
    """
    config, restored = program.config, checkpointer.restore_latest(program.state)
    if restored is not None:
        step, state, position, meta = restored
        if position["fingerprint"] != fingerprint:
            if not config.data.accept_change:
                raise UserError(
                    "the videos of config.data.path, or their shares in a mixture, "
                    "differ from those of this run so far: restore them, give "
                    "another --workdir, or continue with the new ones by "
                    "--config.data.accept_change=True"
                )
            distributed.print_on_main(f"other videos than before, from step {step} on")
        if meta.get("teacher_step", teacher_step) != teacher_step:
            raise UserError(
                f"the teacher of this run is step {meta['teacher_step']} of "
                f"{config.teacher.path}, but step {teacher_step} was read: set "
                f"config.teacher.step={meta['teacher_step']}"
            )
        distributed.print_on_main(f"resumed from step {step}")
        return step, state
    state = program.make_state()
    if config.init.path:
        init = config.init
        step, taken = checkpoint.restore_start(
            init.path,
            program.state,
            init.keep_moments,
            None if init.step < 0 else init.step,
        )
        state = state.replace(**taken)
        distributed.print_on_main(f"starting from step {step} of {config.init.path}")
    return 0, state


def compile_step(program: Program) -> jax.stages.Compiled:
    """Compile the step; print how long that took and what memory the step needs."""
    step_fn, seconds = compilation.compile_step(program.lower())
    memory = compilation.memory_of(step_fn)
    limit = compilation.memory_limit(program.mesh.local_mesh.devices.flat[0])
    of_limit = f" of {limit / compilation.GIB:.2f} GiB" if limit else ""
    distributed.print_on_main(
        f"compiled the step in {seconds:.0f} s; "
        f"it needs {memory or 'unknown memory'}{of_limit}"
    )
    if seconds > _SLOW_SECS and not jax.config.values["jax_compilation_cache_dir"]:
        distributed.print_on_main(
            "config.compilation_cache=FOLDER saves that time at the next start"
        )
    return step_fn
