"""How much each frame of a possible and of an impossible video surprises a network."""

import dataclasses

import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.clips.reader import ClipReader
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.sources.records import Record
from vjepa_jax.data.transforms import transforms
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.evals.physics.surprise import Protocol, surprise
from vjepa_jax.report.figures import Axis, Figure, Line, make_lines
from vjepa_jax.report.films import Film, make_film
from vjepa_jax.world import violations
from vjepa_jax.world.render import FPS, PHYSICS_STREAM
from vjepa_jax.world.scenes import World

MEANINGS = {
    "permanence": "a hidden object is gone, or an object appears that never went in",
    "continuity": "an object jumps to another position",
    "shape": "an object becomes another shape",
    "colour": "an object becomes another colour",
    "solidity": "an object leaves through a wall and comes in on the other side",
    "gravity": "a falling object falls upwards",
    "inertia": "an object turns without a cause",
    "launch": "motion passes to another object without a touch",
    "contact": "an object that is hit stays where it is",
}
_BATCH_SIZE = 16  # windows per call


@dataclasses.dataclass(frozen=True)
class VideoPair:
    """A possible video and one that violates a law.

    Attributes:
      name: of the law.
      possible, impossible: uint8 [T, S, S, 3].
      onset: index of the first frame that differs.
    """

    name: str
    possible: np.ndarray
    impossible: np.ndarray
    onset: int


@dataclasses.dataclass(frozen=True)
class PairView:
    """A pair on the page: its films, and the surprise of all networks below them."""

    name: str
    meaning: str
    onset: int
    films: list[Film]
    figure: Figure


def make_pairs(config: ConfigDict) -> list[VideoPair]:
    """Make the first pair of every law of a run's world, at the run's resolution.

    Raises:
      UserError: the run is not of the world, or its clips are too short.
    """
    world, data = config.world, config.data
    if not world.path:
        raise UserError(
            "no pairs of possible and impossible videos: the run is not of the "
            "synthetic world"
        )
    step = data.frame_step
    if world.num_frames < violations.MIN_FRAMES or not step:
        raise UserError(
            "no pairs of possible and impossible videos: they need world.num_frames of "
            f"{violations.MIN_FRAMES} or more, and data.frame_step"
        )
    looks = World(size=world.size, num_frames=world.num_frames)
    reader = ClipReader(
        Sampling(world.num_frames // step, frame_step=step), data.resolution
    )
    pairs = []
    for name in violations.PROPERTIES:
        made = violations.make_pair(looks, (world.seed, PHYSICS_STREAM), name, 0)
        possible, impossible = (
            reader.read(Record(name, 0, clip.video, FPS), transforms.central_box)[0]
            for clip in (made.possible, made.impossible)
        )
        pairs.append(VideoPair(name, possible, impossible, made.onset // step))
    return pairs


def per_frame(
    frozen: FrozenModel, videos: list[np.ndarray], num_context: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Measure how badly each tubelet is predicted from the frames before it.

    Args:
      frozen: model with a predictor.
      videos: uint8 [T, S, S, 3] each, of equal length.
      num_context: number of frames before the tubelet that the network sees, one or
        more whole tubelets. The first tubelets are predicted from fewer.

    Returns:
      The last frame of each tubelet, int [F], and for every video the surprise, float
      [F]: the mean L1 error of the tubelet's features.

    Raises:
      UserError: the videos are too short.
      ValueError: the context is not a number of whole tubelets.
    """
    tubelet, length = frozen.encoder.tubelet_size, len(videos[0])
    if num_context < tubelet or num_context % tubelet:
        raise ValueError(f"{num_context} frames are not whole tubelets of {tubelet}")
    if 2 * tubelet > length:
        raise UserError(
            f"no surprise frame by frame: the {length} frames of a video are fewer "
            f"than two tubelets of {tubelet}"
        )
    parts = []
    for seen in range(tubelet, num_context + 1, tubelet):
        # Shorter contexts are for tubelets that have no longer one before them.
        last = length if seen == num_context else min(length, seen + 2 * tubelet - 1)
        clips = [video[:last] for video in videos]
        protocol = Protocol(seen + tubelet, 1, (seen,))
        if last >= protocol.num_frames:
            parts.append(surprise(frozen, clips, protocol, _BATCH_SIZE))
    frames = np.arange(2 * tubelet - 1, length)
    return frames, [
        np.concatenate(of_video)[:, 0] for of_video in zip(*parts, strict=True)
    ]


def make_views(
    pairs: list[VideoPair], models: dict[str, FrozenModel]
) -> list[PairView]:
    """Measure the surprise of each network at each pair; the first has a solid line.

    Raises:
      UserError: a network has no predictor, or the videos are too short for it.
    """
    kinds = ("possible", "impossible")
    videos = [v for pair in pairs for v in (pair.possible, pair.impossible)]
    curves = {}
    for name, frozen in models.items():
        frozen.require_predictor()
        curves[name] = per_frame(frozen, videos, context_frames(frozen, videos[0]))
    values = np.concatenate([v for _, found in curves.values() for v in found])
    margin = 0.05 * float(values.max() - values.min()) + 1e-6
    y_axis = Axis(
        "surprise (L1)", (float(values.min()) - margin, float(values.max()) + margin)
    )
    views = []
    for number, pair in enumerate(pairs):
        lines = [
            Line(
                f"{name}: {kind}" if len(models) > 1 else kind,
                frames.tolist(),
                found[2 * number + colour].tolist(),
                colour,
                dash,
            )
            for (name, (frames, found)), dash in zip(
                curves.items(), ("solid", "dot"), strict=False
            )
            for colour, kind in enumerate(kinds)
        ]
        x_axis = Axis("frame", (-0.5, len(pair.possible) - 0.5))
        title = f"Surprise, {pair.name}"
        figure = make_lines(title, lines, x_axis, y_axis, markers=True, height=190)
        films = [
            make_film(video, f"{kind} video of {pair.name}", kind, len(video))
            for kind, video in zip(kinds, (pair.possible, pair.impossible), strict=True)
        ]
        meaning = MEANINGS[pair.name]
        views.append(PairView(pair.name, meaning, pair.onset, films, figure))
    return views


def context_frames(frozen: FrozenModel, video: np.ndarray) -> int:
    """Return how many frames the network sees, at most, before those it predicts."""
    tubelet = frozen.encoder.tubelet_size
    return max(tubelet, len(video) // 2 // tubelet * tubelet)
