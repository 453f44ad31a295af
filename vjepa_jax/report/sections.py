"""The sections of a page: what a model learned, how its run went, what was run."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from vjepa_jax.config.defaults import MAIN_STREAM
from vjepa_jax.evals import frozen
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.program import build
from vjepa_jax.report import clips, curves, figures, results, surprise, tables
from vjepa_jax.report.clips import Clips, Features
from vjepa_jax.report.figures import Figure
from vjepa_jax.report.page import Block, Section, Tile
from vjepa_jax.report.run_files import RESULTS, Run
from vjepa_jax.run.goodput import WALL_SECONDS, duration

UNTRAINED = "random-init"


# Clips of a run's data, and their features by network, the untrained network last.
View = tuple[Clips, dict[str, Features]]


def make_tiles(runs: Sequence[Run]) -> list[Tile]:
    """Make the summary at the top of the page."""

    def last(name: str, form: Callable[[float], str]) -> list[str]:
        values = [run.last(name) for run in runs]
        return [form(v) if math.isfinite(v) else tables.ABSENT for v in values]

    def result(measure: str) -> list[str]:
        texts = []
        for run in runs:
            row = run.results.get(RESULTS, {}).get(measure)
            value = row.get("pretrained") if isinstance(row, dict) else None
            is_number = isinstance(value, int | float)
            texts.append(f"{value:.1%}" if is_number else tables.ABSENT)
        return texts

    tiles = [
        Tile("attentive probe", result("attentive_accuracy")),
        Tile("linear probe", result("linear_accuracy")),
        Tile("effective rank", last("repr/target_effective_rank", "{:.1f}".format)),
        Tile("loss", last("train/loss", "{:.3f}".format)),
        Tile("updates", [tables.count_updates(run) for run in runs]),
        Tile("wall time", last(WALL_SECONDS, duration)),
    ]
    return [tile for tile in tiles if set(tile.values) != {tables.ABSENT}]


def make_sections(runs: Sequence[Run]) -> list[Section]:
    """Make all sections, and read what they need; each names what is missing."""
    # Only shown if clips or weights are missing.
    unseen = Section("clips", "Features, neighbours, masks")
    models = {}
    for run in runs:
        model = unseen.attempt(frozen.load, run.workdir, run.step)
        if model is not None:
            models[run.label] = model
    groups = group_by_shape(models)
    views = see(unseen, groups)
    parts = {
        "What it learned": [
            *([features(views)] if views else []),
            *([unseen] if unseen.missing else []),
            evaluations(runs),
            *([neighbours(views)] if views else []),
            *([physics(groups)] if groups else []),
        ],
        "How the run went": [
            training(runs),
            resources(runs),
            *([masks(models)] if views else []),
            bad_videos(runs),
        ],
        "Settings": [settings(runs)],
    }
    return [
        dataclasses.replace(section, part=part)
        for part, sections in parts.items()
        for section in sections
    ]


# --------------------------------------------------------------------- what it learned


def group_by_shape(models: dict[str, FrozenModel]) -> list[dict[str, FrozenModel]]:
    """Group the models that take clips of the same shape."""
    groups: dict[tuple[int, ...], dict[str, FrozenModel]] = {}
    for label, model in models.items():
        groups.setdefault(model.video_shape, {})[label] = model
    return [*groups.values()]


def see(section: Section, groups: Sequence[dict[str, FrozenModel]]) -> list[View]:
    """Read clips of the data of each group's first model, and encode them.

    Args:
      section: gets a line for data that is missing.
      groups: from `group_by_shape`.
    """
    views = []
    for models in groups:
        first = next(iter(models.values()))
        read = section.attempt(clips.read_clips, first.config)
        if read is not None:
            models = models | {UNTRAINED: frozen.random_init(first, 0)}
            views.append((read, clips.encode(models, read.video)))
    return views


def features(views: Sequence[View]) -> Section:
    """Show features as colours, of pretrained and of untrained networks."""
    section = Section(
        "features",
        "Features",
        "Each clip, and the first three principal components of its tokens from the "
        "target encoder as red, green and blue. The components are fitted for each "
        "network, on the same clips. Colours of two networks cannot be compared.",
    )
    for view in views:
        section.blocks.append(Block("films", clips.feature_rows(*view)))
    return section


def evaluations(runs: Sequence[Run]) -> Section:
    """Show tables of results, and confusion matrices."""
    section = Section(
        "results",
        "Evaluations of frozen features",
        "Brackets hold 95 % intervals over the choice of test videos; ± is a standard "
        "deviation over draws or networks.",
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
            "Of the pretrained network, in percent. A row is a true class; its cells "
            "are the classes that were predicted for its videos."
        )
        section.blocks.append(Block("figures", drawn, "Confusion", lead))
    else:
        section.missing.append("No evaluation wrote a confusion matrix.")
    return section


def _confusion(
    run: Run, name: str, matrix: list[list[int]], is_labelled: bool
) -> Figure:
    names = [str(k) for k in range(len(matrix))]
    known = run.class_names.get(name, [])
    if len(known) == len(matrix):
        names = known
    title = results.results_name(name) + (f", {run.label}" if is_labelled else "")
    return figures.make_confusion(title, matrix, names)


def neighbours(views: Sequence[View]) -> Section:
    """Show the nearest neighbours of a few clips."""
    section = Section(
        "neighbours",
        "Nearest neighbours",
        "The clips of the run's own data whose pooled features have the largest cosine "
        "to those of the clip on the left. Training did not use labels.",
    )
    for view in views:
        count = len(next(iter(view[1].values())).pooled)
        if count < 2:
            section.missing.append("One clip has no neighbours.")
            continue
        queries = clips.neighbour_queries(*view)
        section.blocks.append(Block("queries", queries, lead=f"Among {count} clips."))
    return section


def physics(groups: Sequence[dict[str, FrozenModel]]) -> Section:
    """Show the surprise of networks under possible and impossible videos."""
    section = Section("physics", "Surprise")
    for models in groups:
        first = next(iter(models.values()))
        pairs = section.attempt(surprise.make_pairs, first.config)
        views = pairs and section.attempt(surprise.make_views, pairs, models)
        if views:
            context = surprise.context_frames(first, pairs[0].possible)
            section.lead = (
                "Two videos that are equal up to the dashed line; then one violates a "
                f"law. A tubelet is predicted from up to {context} frames before it; "
                "the surprise is the mean L1 distance to the target's features, drawn "
                "at the tubelet's last frame. The pairs are the first ones of each law."
            )
            section.blocks.append(Block("pairs", views))
    return section


# -------------------------------------------------------------------- how the run went


def training(runs: Sequence[Run]) -> Section:
    """Draw loss, feature health, schedules, speed, and evaluations during training."""
    section = Section(
        "training",
        "Training",
        "The loss alone says little, since its target changes: a loss that falls fast "
        "while the effective rank goes to 1 is a collapse.",
    )
    if not any(run.metrics for run in runs):
        section.missing.append("No metrics were written yet.")
        return section
    for title, charts in curves.GROUPS.items():
        drawn = curves.draw(runs, charts)
        if drawn:
            section.blocks.append(Block("figures", drawn, title))
    drawn, more = curves.draw_evaluations(runs)
    if drawn:
        section.blocks.append(Block("figures", drawn, "Evaluations during training"))
    else:
        section.missing.append("No evaluation ran during training.")
    if more:
        section.missing.append(f"{more} more measures are in metrics.jsonl.")
    return section


def resources(runs: Sequence[Run]) -> Section:
    """Show updates, time, speed and memory."""
    section = Section("resources", "Time and memory")
    wall_time = curves.draw_wall_time(runs)
    if wall_time is None:
        section.missing.append("Where the wall time went was not recorded.")
    else:
        lead = "step: the devices compute. The other parts are time without training."
        section.blocks.append(Block("figures", [wall_time], wall_time.title, lead))
    section.blocks.append(Block("table", tables.progress(runs)))
    return section


def masks(models: dict[str, FrozenModel]) -> Section:
    """Show masks of every stream on clips."""
    section = Section(
        "masks",
        "Masks",
        "The encoder sees the context tokens of a clip, and the predictor predicts the "
        "target tokens. Masks are sampled as in training; shares are of all tokens.",
    )
    shown: list[tuple[Any, str]] = []
    for label, model in models.items():
        streams = build.make_streams(model.config, model.encoder)
        shapes = build.video_shapes(model.config)
        for name, stream in streams.items():
            identity = name, stream, shapes[name]
            same = next((other for known, other in shown if known == identity), None)
            if same:
                section.missing.append(f"{label}, stream {name}: as {same}.")
                continue
            read = section.attempt(
                clips.read_clips, model.config, name, clips.NUM_MASKED
            )
            if read is None:
                continue
            grid = model.grid(shapes[name])
            rows = clips.mask_rows(read, grid, stream.masks, model.config.seed)
            title = "" if name == MAIN_STREAM else f"stream {name}"
            title = ", ".join(filter(None, [label * (len(models) > 1), title]))
            section.blocks.append(Block("films", rows, title))
            shown.append((identity, label))
    return section


def bad_videos(runs: Sequence[Run]) -> Section:
    """List videos that could not be read."""
    section = Section("bad-videos", "Unreadable videos")
    for run in runs:
        if run.bad_videos:
            section.blocks += [Block("table", t) for t in tables.bad_videos(run)]
        else:
            section.missing.append(f"{run.label}: none.")
    return section


# ---------------------------------------------------------------------------- settings


def settings(runs: Sequence[Run]) -> Section:
    """Show model, data, hardware, and the config where it is not the default."""
    section = Section("run", "What ran")
    section.blocks.append(Block("table", tables.settings(runs)))
    differences = tables.config_differences(runs)
    if differences is not None:
        section.blocks.append(Block("table", differences))
    for run in runs:
        section.missing += [f"{run.label}: {note}." for note in run.notes]
    return section
