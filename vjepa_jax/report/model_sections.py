"""The sections that show what a run's model does with clips and videos."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vjepa_jax.config.defaults import MAIN_STREAM
from vjepa_jax.evals import frozen as frozen_models
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.program import build
from vjepa_jax.report import clips, surprise
from vjepa_jax.report.clips import Clips, Encoded
from vjepa_jax.report.parts import Block, Section

UNTRAINED = "random-init"


@dataclasses.dataclass(frozen=True)
class Seen:
    """Clips, and what networks make of them.

    Attributes:
      clips: of the first run's data.
      encoded: by the network's name, the untrained one last.
    """

    clips: Clips
    encoded: dict[str, Encoded]


def grouped(models: dict[str, FrozenModel]) -> list[dict[str, FrozenModel]]:
    """Put models together that take clips of one shape, and so can see the same."""
    groups: dict[tuple[int, ...], dict[str, FrozenModel]] = {}
    for label, model in models.items():
        groups.setdefault(model.video_shape, {})[label] = model
    return [*groups.values()]


def see(section: Section, groups: Sequence[dict[str, FrozenModel]]) -> list[Seen]:
    """Read clips of the data of each group's first model, and encode them.

    Args:
      section: to which is added what is missing.
      groups: from `grouped`.
    """
    seen = []
    for models in groups:
        first = next(iter(models.values()))
        read = section.attempt(clips.read, first.config)
        if read is not None:
            models = models | {UNTRAINED: frozen_models.random_init(first, 0)}
            seen.append(Seen(read, clips.encode(models, read.video)))
    return seen


def masks(models: dict[str, FrozenModel]) -> Section:
    """Masks as they fall on clips, of every stream."""
    section = Section(
        "masks",
        "Masks",
        "Of each clip the encoder sees the tokens left in one picture, and the "
        "predictor predicts those of the other. Drawn as in training.",
    )
    shown: list[tuple[Any, str]] = []
    for label, model in models.items():
        streams = build.make_streams(model.config, model.encoder)
        shapes = build.video_shapes(model.config)
        for name, stream in streams.items():
            drawn = name, stream, shapes[name]
            same = next((who for known, who in shown if known == drawn), None)
            if same:
                section.missing.append(f"{label}, stream {name}: as {same}.")
                continue
            read = section.attempt(clips.read, model.config, name, clips.MASKED)
            if read is None:
                continue
            grid = model.grid(shapes[name])
            rows = clips.mask_rows(read, grid, stream.masks, model.config.seed)
            title = "" if name == MAIN_STREAM else f"stream {name}"
            title = ", ".join(filter(None, [label * (len(models) > 1), title]))
            section.blocks.append(Block("films", rows, title))
            shown.append((drawn, label))
    return section


def colours(seen: Sequence[Seen]) -> Section:
    """Features as colours, pretrained and random."""
    section = Section(
        "features",
        "Features",
        "The first three principal components of the target encoder's tokens as red, "
        "green and blue, fitted for each network on the same clips by the same rule. "
        "Colours compare within a network, not between two.",
    )
    for group in seen:
        rows = clips.colour_rows(group.clips, group.encoded)
        section.blocks.append(Block("films", rows))
    return section


def neighbours(seen: Sequence[Seen]) -> Section:
    """Nearest neighbours of a few clips."""
    section = Section(
        "neighbours",
        "Nearest neighbours",
        "Clips of the run's own data whose pooled features have the largest cosine to "
        "the clip on the left. Labels were not used in training.",
    )
    for group in seen:
        count = len(next(iter(group.encoded.values())).pooled)
        if count < 2:
            section.missing.append("One clip has no neighbours.")
            continue
        queries = clips.neighbour_queries(group.clips, group.encoded)
        section.blocks.append(Block("queries", queries, lead=f"Among {count} clips."))
    return section


def physics(groups: Sequence[dict[str, FrozenModel]]) -> Section:
    """Surprise under possible and impossible videos."""
    section = Section("physics", "Surprise")
    for models in groups:
        first = next(iter(models.values()))
        pairs = section.attempt(surprise.make_pairs, first.config)
        shown = pairs and section.attempt(surprise.show, pairs, models)
        if shown:
            context = surprise.context_frames(first, pairs[0].possible)
            section.lead = (
                "Two videos that are the same up to the dashed line; after it one "
                "breaks a law. A tubelet is predicted from up to "
                f"{context} frames before it; the surprise is the mean L1 distance to "
                "the target's features, at the tubelet's last frame. The first pair of "
                "each law, not chosen."
            )
            section.blocks.append(Block("pairs", shown))
    return section
