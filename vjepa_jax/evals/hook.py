"""Evaluations of a run while it trains, at regular steps.

They evaluate the weights in memory, whether or not these are saved, and do not affect
the run: its numbers stay the same, and it continues when an evaluation fails.
"""

import ast
import dataclasses
import difflib
import re
import runpy
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict, flatten
from vjepa_jax.data.sources.records import Source, evenly_spread
from vjepa_jax.data.stream import streams
from vjepa_jax.evals import drawing, frozen, registry, settings
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.evals.tokens.features import read_clips
from vjepa_jax.objective.state import TrainState
from vjepa_jax.parallel import distributed, sharding
from vjepa_jax.program import build
from vjepa_jax.program.build import Program

PREFIX = "eval/"
IMAGES = "images"  # the name under which a failure to draw is logged and counted
_TIMEOUT_SECS = 24 * 3600  # longest wait of the other processes
_SHOWN = 6  # measures of an evaluation on the console
_COLOURED_CLIPS = 8  # clips that the principal components of features are fitted to
# Turns off untrained models, whose results are the same at every step.
_LEFT_OUT = {"random_init": False, "null_seeds": 0}


@dataclasses.dataclass
class Results:
    """Results of the evaluations after a step; empty on all but the main process.

    Attributes:
      scalars: `eval/NAME/MEASURE` of the model, `eval/NAME/MEASURE/COLUMN` of other
        columns, `eval/NAME/seconds` and `eval/NAME/failed`.
      lines: for the console.
      images: uint8 [H, W, 3] by name.
    """

    scalars: dict[str, float] = dataclasses.field(default_factory=dict)
    lines: list[str] = dataclasses.field(default_factory=list)
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)


class EvaluationHook:
    """Runs the evaluations in `config.evals` of a run.

    The main process evaluates on its own devices while the others wait: a failure there
    cannot leave them in a computation that never ends.
    """

    def __init__(self, program: Program, source: Source):
        """Load the evaluations' configs.

        Args:
          program: of the run.
          source: the run's videos, to draw features and masks on.

        Raises:
          UserError: a config cannot be loaded, or its overrides do not fit.
        """
        self._program, self._source = program, source
        entries = program.config.evals.items()
        self._entries = {name: e for name, e in entries if e.every_steps}
        self._configs = {name: load(name, e) for name, e in self._entries.items()}
        self._failed = dict.fromkeys([*self._entries, IMAGES], 0)

    def add_earlier(self, rows: Sequence[Mapping[str, float]], start_step: int) -> None:
        """Restore the counts of failures of an interrupted run.

        Args:
          rows: its metrics.
          start_step: step of the checkpoint from which the run continues.
        """
        for row in rows:
            if row["step"] <= start_step:
                for name in self._failed:
                    key = _failures(name)
                    self._failed[name] = int(row.get(key, self._failed[name]))

    def is_due(self, step: int) -> bool:
        """Return whether there is an evaluation after this step."""
        return bool(self._due(step))

    def _due(self, step: int) -> list[str]:
        is_last = step == self._program.config.total_steps
        every = {name: entry.every_steps for name, entry in self._entries.items()}
        return [name for name, steps in every.items() if is_last or step % steps == 0]

    def run(self, step: int, state: TrainState) -> Results:
        """Evaluate the state after a step; every process calls.

        Failures are logged and counted.

        Raises:
          LostProcess: another process has ended.
        """
        results = Results()
        # As in `vjepa_jax.probe`, where no mesh of a run is set.
        with sharding.use(None):
            model = frozen.from_state(self._program, state)
            if distributed.is_main():
                for name in self._due(step):
                    config = self._configs[name]
                    self._guarded(results, name, step, _evaluate, name, model, config)
                if self._program.config.log.image_clips:
                    args = model, self._source, step
                    self._guarded(results, IMAGES, step, _draw, *args)
        distributed.barrier(f"evaluated after step {step}", _TIMEOUT_SECS)
        return results

    def _guarded(
        self,
        results: Results,
        name: str,
        step: int,
        function: Callable[..., None],
        *args: Any,
    ) -> None:
        """Call `function(results, *args)`; log and count its failure."""
        began = time.perf_counter()
        try:
            function(results, *args)
        except Exception as error:  # no evaluation may end the run
            self._failed[name] += 1
            logging.error(
                "evaluation '%s' failed after step %d; the run continues: %s: %s",
                name,
                step,
                type(error).__name__,
                " ".join(str(error).split()),
                exc_info=not isinstance(error, UserError),
            )
        results.scalars[_failures(name)] = self._failed[name]
        results.scalars[f"{PREFIX}{name}/seconds"] = time.perf_counter() - began


def _failures(name: str) -> str:
    return f"{PREFIX}{name}/failed"


def load(name: str, entry: ConfigDict) -> ConfigDict:
    """Load the config of an evaluation.

    Args:
      name: of the entry in `config.evals`.
      entry: from `defaults.evaluation`; its `file` names one of `settings.DEFAULTS` or
        a Python file with `get_config()`, with `:ARGUMENT` after either.

    Raises:
      UserError: the file cannot be loaded, or the overrides do not fit it.
    """
    file, _, argument = entry.file.partition(":")
    try:
        get_config = settings.DEFAULTS.get(file) or runpy.run_path(file)["get_config"]
        config = get_config(*([argument] if argument else []))
        registry.find(config)
    except Exception as error:  # raised by the user's own code
        raise UserError(
            f"config.evals.{name}.file={entry.file!r} gives no config of an "
            f"evaluation: {type(error).__name__}: {error}"
        ) from None
    config.update({k: v for k, v in _LEFT_OUT.items() if k in config})
    try:
        for word in shlex.split(entry.overrides):
            key, equals, text = word.partition("=")
            if not equals:
                raise ValueError(f"{word!r}: write key=value, with blanks between")
            known = flatten(config.to_dict())
            if key not in known:
                close = difflib.get_close_matches(key, known, 1, 0.0)[0]
                raise ValueError(f"there is no key {key!r}: did you mean {close!r}?")
            config.update_from_flattened_dict({key: _value(text)})
    except (TypeError, ValueError) as error:
        raise UserError(
            f"config.evals.{name}.overrides={entry.overrides!r} does not fit "
            f"{entry.file}: {error.args[0]}"
        ) from None
    return config


def _value(text: str) -> Any:
    """Return the literal that a word of the command line is, or the word itself."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def _evaluate(
    results: Results, name: str, model: FrozenModel, config: ConfigDict
) -> None:
    began = time.perf_counter()
    scalars = flatten_results(registry.evaluate(model, config))
    results.scalars.update({f"{PREFIX}{name}/{k}": v for k, v in scalars.items()})
    shown = [f"{key} {value:.4g}" for key, value in scalars.items()]
    more = ["..."] if len(shown) > _SHOWN else []
    measures = ", ".join(shown[:_SHOWN] + more)
    results.lines.append(f"{name}: {measures} ({time.perf_counter() - began:.1f} s)")


def flatten_results(results: Mapping[str, Any]) -> dict[str, float]:
    """Return an evaluation's numbers by the names of metrics, see `Results`.

    Args:
      results: {measure: number, or {column: number}}; other values are left out.
    """
    flat = {}
    for measure, values in results.items():
        columns = values if isinstance(values, dict) else {"pretrained": values}
        for column, value in columns.items():
            if isinstance(value, int | float | np.number):
                name = measure if column == "pretrained" else f"{measure}/{column}"
                flat[re.sub(r"[^\w./-]+", "_", name)] = float(value)
    return flat


def _draw(results: Results, model: FrozenModel, source: Source, step: int) -> None:
    """Draw token masks, and features as colours, on some of the run's clips."""
    run = model.config
    count = run.log.image_clips
    clips = _read_clips(run, source, max(count, _COLOURED_CLIPS))
    grid = model.grid(clips.shape)
    masks = build.make_masks(run.masks, grid)
    colours = drawing.principal_colours(model.encode(clips), grid)
    for i, clip in enumerate(clips[:count]):
        key = jax.random.key(step + i)
        rows = {
            "masks": drawing.mask_rows(clip, grid, masks, key),
            "features": {"clip": clip, "features": colours[i]},
        }
        for name, of_clip in rows.items():
            picture = drawing.make_picture(of_clip)
            results.images[f"{name}/{i}"] = np.asarray(picture)


def _read_clips(run: ConfigDict, source: Source, count: int) -> np.ndarray:
    """Read clips of videos spread over the list: uint8 [n, T, H, W, 3]."""
    data = run.data.copy_and_resolve_references()
    data.num_clips = 1
    order = evenly_spread(len(source), count)
    clips = read_clips(source, streams.make_reader(data, data), order)
    if not len(clips):
        raise UserError(f"none of {len(order)} videos to draw can be read")
    return clips
