"""How much each frame of a possible and of an impossible video surprises a network."""

import dataclasses

import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.clips import reader
from vjepa_jax.data.sources.records import Record
from vjepa_jax.data.transforms import transforms
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.evals.physics import physics
from vjepa_jax.report import figures
from vjepa_jax.report.figures import Figure, Line
from vjepa_jax.report.media import Film, film
from vjepa_jax.world import violations
from vjepa_jax.world.render import FPS, PHYSICS_STREAM
from vjepa_jax.world.scenes import World

MEANINGS = {
    "permanence": "what is hidden is gone, or what never was comes out",
    "continuity": "it is somewhere else at once",
    "shape": "it becomes another shape",
    "colour": "it becomes another colour",
    "solidity": "it leaves through a wall and comes in opposite",
    "gravity": "a falling object falls upwards",
    "inertia": "it turns for no cause",
    "launch": "motion passes on without a touch",
    "contact": "what is struck stays where it is",
}
_BATCH = 16  # windows per call


@dataclasses.dataclass(frozen=True)
class Pair:
    """A possible video and one that breaks a law.

    Attributes:
      name: of the law.
      possible, impossible: uint8 [T, S, S, 3].
      onset: the first frame that differs.
    """

    name: str
    possible: np.ndarray
    impossible: np.ndarray
    onset: int


@dataclasses.dataclass(frozen=True)
class Shown:
    """A pair on the page: the films and the curves of all networks below them."""

    name: str
    meaning: str
    onset: int
    films: list[Film]
    figure: Figure


def make_pairs(config: ConfigDict) -> list[Pair]:
    """Make the first pair of every property of a run's world, as it sees clips.

    Raises:
      UserError: the run is not of the world, or its clips are too short.
    """
    world, data = config.world, config.data
    if not world.path:
        raise UserError(
            "no pairs of possible and impossible videos: the run is not of the "
            "synthetic world"
        )
    step = data.frame_step or 1
    if world.num_frames < violations.MIN_FRAMES or not data.frame_step:
        raise UserError(
            "no pairs of possible and impossible videos: they need world.num_frames of "
            f"{violations.MIN_FRAMES} or more, and data.frame_step"
        )
    looks = World(size=world.size, num_frames=world.num_frames)
    pairs = []
    for name in violations.PROPERTIES:
        made = violations.make_pair(looks, (world.seed, PHYSICS_STREAM), name, 0)
        videos = [
            reader.read_clip(
                Record(name, 0, clip.video, FPS),
                num_frames=world.num_frames // step,
                frame_step=step,
                size=data.resolution,
                crop=transforms.central_box,
            )
            for clip in (made.possible, made.impossible)
        ]
        pairs.append(Pair(name, *videos, made.onset // step))
    return pairs


def per_frame(
    frozen: FrozenModel, videos: list[np.ndarray], num_context: int
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Measure how badly each tubelet is predicted from the frames before it.

    Args:
      frozen: with a predictor.
      videos: uint8 [T, S, S, 3] each, of one length.
      num_context: frames before the tubelet that are seen, one whole tubelet or more;
        those of the first tubelets are as many as there are.

    Returns:
      The last frame of each tubelet, int [F], and the surprise of every video, float
      [F]: the mean L1 error of the tubelet's features.

    Raises:
      UserError: the videos are too short.
      ValueError: the context is not of whole tubelets.
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
        # From the next number on there is room for a tubelet more.
        last = length if seen == num_context else min(length, seen + 2 * tubelet - 1)
        clips = [video[:last] for video in videos]
        protocol = physics.Protocol(seen + tubelet, 1, (seen,))
        if last >= protocol.num_frames:
            parts.append(physics.surprise(frozen, clips, protocol, _BATCH))
    frames = np.arange(2 * tubelet - 1, length)
    return frames, [
        np.concatenate(of_video)[:, 0] for of_video in zip(*parts, strict=True)
    ]


def show(pairs: list[Pair], models: dict[str, FrozenModel]) -> list[Shown]:
    """Show pairs with the curves of networks, the first one's solid.

    Raises:
      UserError: a network cannot predict, or the videos are too short for it.
    """
    videos = [v for pair in pairs for v in (pair.possible, pair.impossible)]
    of_models = {}
    for name, frozen in models.items():
        frozen.require_predictor()
        of_models[name] = per_frame(frozen, videos, context_frames(frozen, videos[0]))
    highest = max(float(np.max(c)) for _, curves in of_models.values() for c in curves)
    lowest = min(float(np.min(c)) for _, curves in of_models.values() for c in curves)
    margin = 0.05 * (highest - lowest) + 1e-6
    shown = []
    for number, pair in enumerate(pairs):
        drawn = []
        for (name, (frames, curves)), dash in zip(
            of_models.items(), ("solid", "dot"), strict=False
        ):
            prefix = f"{name}: " if len(models) > 1 else ""
            for kind, what in enumerate(("possible", "impossible")):
                y = curves[2 * number + kind].tolist()
                drawn.append(Line(prefix + what, frames.tolist(), y, kind, dash))
        figure = figures.lines(
            f"Surprise, {pair.name}",
            drawn,
            x_title="frame",
            y_title="surprise (L1)",
            x_range=(-0.5, len(pair.possible) - 0.5),
            y_range=(lowest - margin, highest + margin),
            markers=True,
            height=190,
        )
        films = [
            film(video, f"{what} video of {pair.name}", what, len(video))
            for what, video in (
                ("possible", pair.possible),
                ("impossible", pair.impossible),
            )
        ]
        meaning = MEANINGS[pair.name]
        shown.append(Shown(pair.name, meaning, pair.onset, films, figure))
    return shown


def context_frames(frozen: FrozenModel, video: np.ndarray) -> int:
    """Return how many frames the network sees, at most, before those it predicts."""
    tubelet = frozen.encoder.tubelet_size
    return max(tubelet, len(video) // 2 // tubelet * tubelet)
