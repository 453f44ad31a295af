"""Masks, features and nearest neighbours of the clips of a run's data."""

import dataclasses
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from sklearn.preprocessing import normalize

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import MAIN_STREAM, ConfigDict
from vjepa_jax.data.sources.records import Subset
from vjepa_jax.data.stream import streams
from vjepa_jax.data.stream.read_all import read_all
from vjepa_jax.evals import drawing
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.objective import masking
from vjepa_jax.report.films import Film, FilmRow, make_film, make_row
from vjepa_jax.world.motion import CLASSES

NUM_CLIPS = 256  # read of a run's data
NUM_MASKED = 2  # clips that show masks
_NUM_COLOURED, _NUM_QUERIES = 3, 4  # clips that show features, and their neighbours
_NUM_FITTED = 32  # clips on which principal components are fitted
_NUM_NEIGHBOURS = 5
_NEIGHBOUR_FRAMES = 8
# Large models are slow: after so many seconds, reading and encoding stop once they have
# the least number of clips.
_SECONDS, _MIN_CLIPS = 20.0, 16
_BATCH_SIZE = 8


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips of a run's data.

    Attributes:
      video: uint8 [N, T, H, W, 3].
      paths: of their videos.
      names: of their classes; "" where there are no classes.
    """

    video: np.ndarray
    paths: list[str]
    names: list[str]

    def title(self, number: int) -> str:
        """Return the heading of a clip: its number from 1, and its class."""
        return ", ".join(filter(None, [f"Clip {number + 1}", self.names[number]]))


def read_clips(
    config: ConfigDict, stream: str = MAIN_STREAM, count: int = NUM_CLIPS
) -> Clips:
    """Read clips of evenly spaced videos of a run's data, as an evaluation does.

    Raises:
      UserError: the data is missing, or none of the clips can be read.
    """
    source = streams.open_sources(config)[stream]
    clip = config.data if stream == MAIN_STREAM else config.streams[stream]
    reader = streams.make_reader(config.data, clip)
    sampling = dataclasses.replace(reader.sampling, num_clips=1)
    reader = dataclasses.replace(reader, sampling=sampling)
    classes = (*CLASSES, "play") if config.world.path else ()
    count = min(count, len(source))
    chosen = Subset(source, np.arange(count) * len(source) // count)
    # Lists are often sorted by class: in random order, those read in time are a fair
    # sample.
    order = np.random.default_rng(0).permutation(len(chosen))
    video, indices, labels, began = [], [], [], time.perf_counter()
    for batch in read_all(
        chosen, reader=reader, batch_size=_BATCH_SIZE, num_workers=0, order=order
    ):
        valid = batch["valid"]
        video.append(np.asarray(batch["video"])[valid])
        indices += batch["index"][valid].tolist()
        labels += batch["label"][valid].tolist()
        is_late = time.perf_counter() - began > _SECONDS
        if is_late and len(indices) >= _MIN_CLIPS:
            break
    if not indices:
        raise UserError(f"none of the videos of {source.name!r} can be read")
    parts = [source.source_of(int(chosen.indices[i])) for i in indices]
    names = [
        "" if part.unlabelled else _class_name(label, classes or part.class_names)
        for part, label in zip(parts, labels, strict=True)
    ]
    if len(set(names)) == 1:
        names = [""] * len(names)
    return Clips(np.concatenate(video), [chosen.path_of(i) for i in indices], names)


def _class_name(label: int, names: Sequence[str] | None) -> str:
    if names is not None and 0 <= label < len(names):
        return names[label]
    return f"class {label}"


def mask_rows(
    clips: Clips,
    grid: masking.Grid,
    masks: Mapping[str, masking.MaskSpec],
    seed: int,
) -> list[FilmRow]:
    """Show clips, and the context and targets of every mask type on them."""
    key = jax.random.key(seed)
    return [
        make_row(
            clips.title(i),
            drawing.mask_rows(clip, grid, masks, jax.random.fold_in(key, i)),
        )
        for i, clip in enumerate(clips.video[:NUM_MASKED])
    ]


@dataclasses.dataclass(frozen=True)
class Features:
    """A network's features of clips.

    Attributes:
      colours: uint8 [n, T', H', W', 3], principal components of the first clips.
      pooled: float32 [N, D], mean tokens of all clips.
    """

    colours: np.ndarray
    pooled: np.ndarray


def encode(models: dict[str, FrozenModel], video: np.ndarray) -> dict[str, Features]:
    """Encode clips with several networks; fewer clips if the first is slow."""
    features: dict[str, Features] = {}
    for name, model in models.items():
        tokens, pooled, began = [], [], time.perf_counter()
        for start in range(0, len(video), _BATCH_SIZE):
            batch = video[start : start + _BATCH_SIZE]
            missing = _BATCH_SIZE - len(batch)  # filled: equal shapes compile once
            padded = np.concatenate([batch, batch[:1].repeat(missing, 0)])
            encoded = model.encode(padded)[: len(batch)]
            if start < _NUM_FITTED:
                tokens.append(encoded)
            pooled.append(encoded.mean((1, 2)))
            is_late = time.perf_counter() - began > _SECONDS
            if is_late and not features and start + _BATCH_SIZE >= _MIN_CLIPS:
                break
        colours = drawing.principal_colours(
            np.concatenate(tokens), model.grid(video.shape)
        )
        features[name] = Features(colours, np.concatenate(pooled))
        video = video[: len(features[name].pooled)]
    return features


def feature_rows(clips: Clips, features: dict[str, Features]) -> list[FilmRow]:
    """Show clips beside the principal components of their features as colours."""
    rows = []
    for i, clip in enumerate(clips.video[:_NUM_COLOURED]):
        colours = {name: of_network.colours[i] for name, of_network in features.items()}
        rows.append(make_row(clips.title(i), {"clip": clip} | colours))
    return rows


@dataclasses.dataclass(frozen=True)
class Query:
    """A clip, and a row of its nearest neighbours for each network."""

    film: Film
    rows: list[FilmRow]


def neighbour_queries(clips: Clips, features: dict[str, Features]) -> list[Query]:
    """Show a few clips with those whose pooled features have the largest cosine."""
    neighbours = {name: nearest(x.pooled) for name, x in features.items()}
    num_clips = min(len(x.pooled) for x in features.values())
    # The first clip of each class, where there are classes.
    _, firsts = np.unique(clips.names[:num_clips], return_index=True)
    candidates = dict.fromkeys([*np.sort(firsts).tolist(), *range(num_clips)])
    queries = []
    for query in [*candidates][:_NUM_QUERIES]:
        name = clips.names[query]
        rows = []
        for network, (indices, cosines) in neighbours.items():
            found = indices[query].tolist()
            films = [
                _small_film(clips, i, f"{clips.names[i]} {cosine:.3f}".strip())
                for i, cosine in zip(found, cosines[query], strict=True)
            ]
            same = sum(clips.names[i] == name for i in found)
            of_class = f", {same} of {len(films)} of its class" if name else ""
            rows.append(FilmRow(f"{network}{of_class}", films))
        queries.append(Query(_small_film(clips, query, name or "query"), rows))
    return queries


def nearest(pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the nearest other clips of each clip by cosine, the nearest first.

    Args:
      pooled: float [N, D].

    Returns:
      Their indices and cosines, [N, K] each.
    """
    unit = normalize(pooled)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    indices = np.argsort(-cosines, axis=1)[:, : min(_NUM_NEIGHBOURS, len(unit) - 1)]
    return indices, np.take_along_axis(cosines, indices, axis=1)


def _small_film(clips: Clips, index: int, caption: str) -> Film:
    alt = f"clip of {clips.paths[index]}"
    return make_film(clips.video[index], alt, caption, _NEIGHBOUR_FRAMES)
