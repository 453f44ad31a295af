"""The sections of a page: what each shows of one run or of two."""

import math
from collections.abc import Callable, Sequence

from vjepa_jax.evals import frozen
from vjepa_jax.report import curves, figures, model_sections, results, tables
from vjepa_jax.report.figures import Figure
from vjepa_jax.report.parts import Block, Section, Tile
from vjepa_jax.report.run_files import CONFUSION, RESULTS, Run
from vjepa_jax.run.goodput import WALL_SECONDS, duration
from vjepa_jax.world.motion import CLASSES


def tiles(runs: Sequence[Run]) -> list[Tile]:
    """Return the few numbers to look at first."""

    def formatted(name: str, form: Callable[[float], str]) -> list[str]:
        values = [run.last(name) for run in runs]
        return [form(v) if math.isfinite(v) else tables.ABSENT for v in values]

    def of_results(measure: str) -> list[str]:
        out = []
        for run in runs:
            row = run.results.get(RESULTS, {}).get(measure)
            value = row.get("pretrained") if isinstance(row, dict) else None
            is_number = isinstance(value, int | float)
            out.append(f"{value:.1%}" if is_number else tables.ABSENT)
        return out

    found = [
        Tile("updates", [tables.steps_of(run) for run in runs]),
        Tile("wall time", formatted(WALL_SECONDS, duration)),
        Tile("loss", formatted("train/loss", "{:.3f}".format)),
        Tile(
            "effective rank", formatted("repr/target_effective_rank", "{:.1f}".format)
        ),
        Tile("attentive probe", of_results("attentive_accuracy")),
        Tile("linear probe", of_results("linear_accuracy")),
    ]
    return [tile for tile in found if set(tile.values) != {tables.ABSENT}]


def what_ran(runs: Sequence[Run]) -> Section:
    """Facts, config differences, and where the time went."""
    section = Section("run", "What ran")
    section.blocks.append(Block("table", tables.facts(runs)))
    goodput = curves.goodput(runs)
    if goodput is None:
        section.missing.append("Where the wall time went was not recorded.")
    else:
        lead = "step: the devices compute. The rest is time that training did not have."
        section.blocks.append(Block("figures", [goodput], goodput.title, lead))
    differences = tables.config_differences(runs)
    if differences is not None:
        section.blocks.append(Block("table", differences))
    for run in runs:
        section.missing += [f"{run.label}: {note}." for note in run.notes]
    return section


def training(runs: Sequence[Run]) -> Section:
    """Loss, feature health, schedules, speed, and evaluations during training."""
    section = Section(
        "training",
        "Training",
        "The loss alone says little, since its target moves: one that falls fast while "
        "the effective rank goes to 1 is a collapse.",
    )
    if not any(run.metrics for run in runs):
        section.missing.append("No metrics were written yet.")
        return section
    for title, charts in curves.GROUPS.items():
        drawn = curves.draw(runs, charts)
        if drawn:
            section.blocks.append(Block("figures", drawn, title))
    drawn, left_out = curves.evaluations(runs)
    if drawn:
        section.blocks.append(Block("figures", drawn, "Evaluations during training"))
    else:
        section.missing.append("No evaluation ran during training.")
    if left_out:
        section.missing.append(f"{left_out} more measures are in metrics.jsonl.")
    return section


def evaluations(runs: Sequence[Run]) -> Section:
    """Tables of results, and confusion matrices."""
    section = Section(
        "results",
        "Evaluations of frozen features",
        "Intervals in brackets are of 95 % and of the choice of test videos; ± is a "
        "standard deviation over draws or networks.",
    )
    for table in results.make_tables(runs):
        section.blocks.append(Block("table", table))
    if not section.blocks:
        section.lead = ""
        section.missing.append(
            "No evaluation was run: python -m vjepa_jax.probe writes results."
        )
    drawn = [
        _confusion(run, name, matrices["pretrained"], len(runs) > 1)
        for run in runs
        for name, matrices in run.confusions.items()
        if "pretrained" in matrices
    ]
    if drawn:
        lead = (
            "Of the trained network, in percent: a row is a true class, and says what "
            "its videos were taken for."
        )
        section.blocks.append(Block("figures", drawn, "Confusion", lead))
    else:
        section.missing.append("No evaluation wrote a confusion matrix.")
    return section


def _confusion(run: Run, name: str, matrix: list[list[int]], named: bool) -> Figure:
    of_world = name == CONFUSION and len(matrix) == len(CLASSES)
    names = list(CLASSES) if of_world else [str(k) for k in range(len(matrix))]
    title = results.results_name(name) + (f", {run.label}" if named else "")
    return figures.confusion(title, matrix, names)


def bad_videos(runs: Sequence[Run]) -> Section:
    """Videos that could not be read."""
    section = Section("bad-videos", "Unreadable videos")
    for run in runs:
        if run.bad_videos:
            section.blocks += [Block("table", t) for t in tables.bad_videos(run)]
        else:
            section.missing.append(f"{run.label}: none.")
    return section


def make(runs: Sequence[Run]) -> list[Section]:
    """Make all sections; what needs weights or data that is not there says so."""
    made = [what_ran(runs), training(runs)]
    # Says why where none of what it names can be shown.
    shown = Section("clips", "Masks, features, neighbours")
    models = {}
    for run in runs:
        model = shown.attempt(frozen.load, run.workdir)
        if model is not None:
            models[run.label] = model
    groups = model_sections.grouped(models)
    seen = model_sections.see(shown, groups)
    if seen:
        made.append(model_sections.masks(models))
        made += [model_sections.colours(seen), model_sections.neighbours(seen)]
    if shown.missing:
        made.append(shown)
    made.append(evaluations(runs))
    if groups:
        made.append(model_sections.physics(groups))
    return [*made, bad_videos(runs)]
