"""Pictures of what a model makes of the clips of its run's data."""

import dataclasses
import time
from collections.abc import Sequence

import jax
import numpy as np
from sklearn.preprocessing import normalize

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import MAIN_STREAM, ConfigDict
from vjepa_jax.data.sources.mixture import Mixture
from vjepa_jax.data.sources.subset import Subset
from vjepa_jax.data.stream import streams
from vjepa_jax.data.stream.read_all import read_all
from vjepa_jax.data.stream.reading import Reading
from vjepa_jax.evals.drawing import per_pixel, principal_colours
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.objective import masking
from vjepa_jax.report.media import Film, film
from vjepa_jax.world.motion import CLASSES

NUM_CLIPS = 256  # read of a run's data
_SECONDS = 20.0  # after which no more are read, or encoded: large models take time
_AT_LEAST = 16
_BATCH = 8
_FITTED = 32  # clips on which principal components are fitted
MASKED = 2  # clips that show masks
_COLOURED, _QUERIES = 3, 4  # clips that show features, and their neighbours
_NEIGHBOURS = 5
_NEIGHBOUR_FRAMES = 8


@dataclasses.dataclass(frozen=True)
class Clips:
    """Clips of a run's data.

    Attributes:
      video: uint8 [N, T, H, W, 3].
      paths: of their videos.
      names: of their classes, "" where there are none.
    """

    video: np.ndarray
    paths: list[str]
    names: list[str]


@dataclasses.dataclass(frozen=True)
class Row:
    """Films that belong together, under a heading of their own."""

    title: str
    films: list[Film]


def read(
    config: ConfigDict, stream: str = MAIN_STREAM, count: int = NUM_CLIPS
) -> Clips:
    """Read clips of a run's data, evenly spaced, cut as in an evaluation.

    Raises:
      UserError: the data is not there, or none of the clips can be read.
    """
    source = streams.open_sources(config)[stream]
    clip = config.data if stream == MAIN_STREAM else config.streams[stream]
    reading = streams.make_reading(config.data, clip)
    reading = dataclasses.replace(
        reading, sampling=dataclasses.replace(reading.sampling, num_clips=1)
    )
    return _read(source, reading, count, _class_names(config))


def _read(
    source: Mixture, reading: Reading, count: int, classes: Sequence[str]
) -> Clips:
    count = min(count, len(source))
    chosen = Subset(source, np.arange(count) * len(source) // count)
    # Lists often go by class: in a random order those that time allows are a fair part.
    order = np.random.default_rng(0).permutation(len(chosen))
    video, places, labels, began = [], [], [], time.perf_counter()
    batches = read_all(
        chosen, reading=reading, batch_size=_BATCH, num_workers=0, order=order
    )
    for batch in batches:
        valid = batch["valid"]
        video.append(np.asarray(batch["video"])[valid])
        places += batch["index"][valid].tolist()
        labels += batch["label"][valid].tolist()
        is_late = time.perf_counter() - began > _SECONDS
        if is_late and len(places) >= _AT_LEAST:
            batches.close()
            break
    if not places:
        raise UserError(f"none of the videos of {source.name!r} can be read")
    has_classes = len(set(labels)) > 1
    names = [
        (classes[k] if k < len(classes) else f"class {k}") if has_classes else ""
        for k in labels
    ]
    return Clips(np.concatenate(video), [chosen.path_of(i) for i in places], names)


def _class_names(config: ConfigDict) -> tuple[str, ...]:
    return (*CLASSES, "play") if config.world.path else ()


def mask_rows(
    clips: Clips,
    grid: masking.Grid,
    masks: dict[str, masking.MaskSpec],
    seed: int,
) -> list[Row]:
    """Show clips, and per mask type what the encoder sees and what is predicted."""
    rows = []
    for number, clip in enumerate(clips.video[:MASKED]):
        films = [film(clip, f"clip {number + 1}", "the clip")]
        key = jax.random.fold_in(jax.random.key(seed), number)
        for place, (name, spec) in enumerate(masks.items()):
            drawn = masking.sample(jax.random.fold_in(key, place), key, 1, grid, spec)
            for what, idx in zip(("sees", "predicts"), drawn, strict=True):
                share = idx.shape[1] / np.prod(grid)
                films.append(
                    film(
                        _only(clip, grid, np.asarray(idx)[0]),
                        f"clip {number + 1}, only what mask {name} {what}",
                        f"{name}: {what} {share:.0%}",
                    )
                )
        rows.append(Row(f"Clip {number + 1}{_of_class(clips.names[number])}", films))
    return rows


def _only(clip: np.ndarray, grid: masking.Grid, idx: np.ndarray) -> np.ndarray:
    """Make all but some tokens of a clip nearly transparent: RGBA."""
    marked = np.zeros(grid, bool)
    marked.reshape(-1)[idx] = True
    alpha = np.where(per_pixel(marked, clip.shape), 255, 20).astype(np.uint8)
    return np.concatenate([clip, alpha[..., None]], axis=-1)


@dataclasses.dataclass(frozen=True)
class Encoded:
    """What a network makes of clips.

    Attributes:
      grid: its (T', H', W') tokens of a clip.
      tokens: float32 [n, T', H' * W', D], of the first clips.
      pooled: float32 [N, D], mean tokens of all clips.
    """

    grid: masking.Grid
    tokens: np.ndarray
    pooled: np.ndarray


def encode(models: dict[str, FrozenModel], video: np.ndarray) -> dict[str, Encoded]:
    """Encode clips with several networks, as many as the first has the time for."""
    encoded: dict[str, Encoded] = {}
    for name, model in models.items():
        tokens, pooled, began = [], [], time.perf_counter()
        for start in range(0, len(video), _BATCH):
            batch = video[start : start + _BATCH]
            missing = _BATCH - len(batch)  # one shape, one compilation
            found = model.encode(np.concatenate([batch, batch[:1].repeat(missing, 0)]))
            found = found[: len(batch)]
            if start < _FITTED:
                tokens.append(found)
            pooled.append(found.mean((1, 2)))
            is_late = time.perf_counter() - began > _SECONDS
            if is_late and not encoded and start + _BATCH >= _AT_LEAST:
                break
        encoded[name] = Encoded(
            model.grid(video.shape), np.concatenate(tokens), np.concatenate(pooled)
        )
        video = video[: len(encoded[name].pooled)]
    return encoded


def colour_rows(clips: Clips, encoded: dict[str, Encoded]) -> list[Row]:
    """Show clips beside the principal components of their features as colours."""
    colours = {
        name: principal_colours(of_network.tokens, of_network.grid)
        for name, of_network in encoded.items()
    }
    rows = []
    for number, clip in enumerate(clips.video[:_COLOURED]):
        films = [film(clip, f"clip {number + 1}", "the clip")]
        for name, of_clips in colours.items():
            pixels = np.round(of_clips[number] * 255).astype(np.uint8)
            alt = f"features of clip {number + 1} by the {name} encoder as colours"
            films.append(film(pixels, alt, name))
        rows.append(Row(f"Clip {number + 1}{_of_class(clips.names[number])}", films))
    return rows


@dataclasses.dataclass(frozen=True)
class Query:
    """A clip and its nearest ones by each network.

    Attributes:
      film: the clip.
      rows: the nearest ones, a row per network.
    """

    film: Film
    rows: list[Row]


def neighbour_queries(clips: Clips, encoded: dict[str, Encoded]) -> list[Query]:
    """Show a few clips with those whose pooled features have the largest cosine."""
    nearest = {name: _nearest(found.pooled) for name, found in encoded.items()}
    num_clips = min(len(found.pooled) for found in encoded.values())
    queries = []
    # Of different classes, where there are any.
    _, firsts = np.unique(clips.names[:num_clips], return_index=True)
    chosen = [*np.sort(firsts), *range(num_clips)]
    for query in list(dict.fromkeys(int(q) for q in chosen))[:_QUERIES]:
        name = clips.names[query]
        rows = []
        for network, (places, cosines) in nearest.items():
            films = [
                _small(clips, p, f"{clips.names[p]} {c:.3f}".strip())
                for p, c in zip(places[query].tolist(), cosines[query], strict=True)
            ]
            same = sum(clips.names[p] == name for p in places[query].tolist())
            of_class = f", {same} of {len(films)} of its class" if name else ""
            rows.append(Row(f"{network}{of_class}", films))
        queries.append(Query(_small(clips, query, name or "query"), rows))
    return queries


def _nearest(pooled: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return places and cosines of the nearest other clips, [N, K] each."""
    unit = normalize(pooled)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    places = np.argsort(-cosine, axis=1)[:, : min(_NEIGHBOURS, len(unit) - 1)]
    return places, np.take_along_axis(cosine, places, axis=1)


def _small(clips: Clips, place: int, caption: str) -> Film:
    alt = f"clip of {clips.paths[place]}"
    return film(clips.video[place], alt, caption, _NEIGHBOUR_FRAMES)


def _of_class(name: str) -> str:
    return f", {name}" if name else ""
