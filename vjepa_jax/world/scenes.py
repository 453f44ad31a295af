"""Data of the synthetic world: looks, scene, motion, tracks, clips."""

import dataclasses

import numpy as np

SHAPES = ("disc", "square", "triangle", "cross")


@dataclasses.dataclass(frozen=True)
class World:
    """The look of a world; with a seed and an index it determines every pixel.

    Attributes:
      size: side of the square frame in pixels, even (H.264 with 4:2:0 chroma).
      num_frames: frames per clip.
      num_companions: objects besides the main one, at least 1.
      main_radius, companion_radius: (low, high), in sides.
      companion_speed: their largest speed, sides per frame.
      camera_speed: largest speed of the scrolling background, sides per frame.
      still_fraction: share of the clips whose background does not move.
      background_contrast: amplitude of the background's texture, 0 to 1.
      background_change: random walk of the texture's phases, radians per frame; a
        predictor gains nothing from details that it cannot foresee.
      light_change: random walk of the light's three colours, relative, per frame.
    """

    size: int = 48
    num_frames: int = 16
    num_companions: int = 1
    companion_speed: float = 0.006
    main_radius: tuple[float, float] = (0.13, 0.16)
    companion_radius: tuple[float, float] = (0.06, 0.08)
    camera_speed: float = 0.03
    still_fraction: float = 0.3
    background_contrast: float = 0.02
    background_change: float = 0.4
    light_change: float = 0.02


@dataclasses.dataclass
class Scene:
    """Everything drawn at the middle frame, before a class is chosen.

    Objects are indexed along the first axis; the main object is number 0.
    """

    position: np.ndarray  # [K, 2] x, y (y grows downwards)
    radius: np.ndarray  # [K]
    angle: np.ndarray  # [K] radians
    shape: np.ndarray  # [K] index into SHAPES
    colours: np.ndarray  # [K, 2, 3] the two colours of the stripes, 0 to 1
    stripes: np.ndarray  # [K, 2] stripes per radius, phase
    occluder: np.ndarray  # [4] centre x, y, half width, half height
    occluder_colours: np.ndarray  # [2, 3]
    waves: np.ndarray  # [W, 6] background: fx, fy, phase, and an amplitude per channel
    background: np.ndarray  # [3] mean colour
    camera: np.ndarray  # [2] background velocity
    phases: np.ndarray  # [T, W] added to the waves' phases
    light: np.ndarray  # [T, 3] gain of each colour


@dataclasses.dataclass
class Motion:
    """The motion of a class: velocities at the middle frame, spin, growth, gravity."""

    velocity: np.ndarray  # [K, 2]
    spin: np.ndarray  # [K] radians per frame
    growth: np.ndarray  # [K] relative growth per frame
    gravity: float
    behind: np.ndarray  # [K] bool: passes behind the occluder


@dataclasses.dataclass
class Track:
    """The state of every object in every frame, to be painted.

    A motion keeps shape and colours; a violation of physics may change them.
    """

    position: np.ndarray  # [T, K, 2]
    velocity: np.ndarray  # [T, K, 2] sides per frame
    radius: np.ndarray  # [T, K]
    angle: np.ndarray  # [T, K] radians
    shape: np.ndarray  # [T, K] index into SHAPES
    colours: np.ndarray  # [T, K, 2, 3]
    present: np.ndarray  # [T, K] bool

    @classmethod
    def of(
        cls,
        scene: Scene,
        position: np.ndarray,
        velocity: np.ndarray,
        radius: np.ndarray,
        angle: np.ndarray,
    ) -> "Track":
        """Make the track of objects that keep their shapes and colours."""
        frames, count = radius.shape
        return cls(
            position,
            velocity,
            radius,
            angle,
            shape=np.tile(scene.shape, (frames, 1)),
            colours=np.tile(scene.colours, (frames, 1, 1, 1)),
            present=np.ones((frames, count), bool),
        )


@dataclasses.dataclass
class Clip:
    """A rendered clip with its ground truth: `T` frames, `K` objects, 0 the main one.

    Positions and velocities are fractions of the side (per frame). `visibility` is the
    visible share of an object's area; `objects` holds 0 for the background, k + 1 for
    object k and K + 1 for the occluder.
    """

    video: np.ndarray  # uint8 [T, S, S, 3]
    objects: np.ndarray  # uint8 [T, S, S]
    position: np.ndarray  # float32 [T, K, 2]
    velocity: np.ndarray  # float32 [T, K, 2]
    visibility: np.ndarray  # float32 [T, K]
    label: int
