r"""Measure how much videos surprise a model, over time and space, and rank them.

    python -m vjepa_jax.surprise --workdir=RUN --video=FILE_OR_FOLDER [--output=DIR]

RUN is the workdir of a run, or a folder of converted weights; it must hold a predictor.
Windows slide over each video. The features of a window's last frames are predicted
from its first ones; the surprise is the error of the prediction. The ranking is
printed. DIR, by default RUN/surprise, gets ranking.json, windows.jsonl (a line per
window), surprise.png (curves), films/NAME.mp4 (each video beside its heat map), and
with --write=maps also maps/NAME.npz. See docs/surprise.md.

Videos that cannot be read are named and skipped. The exit code is 2 if none can.
"""

import os
import pathlib
import sys

from absl import flags

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.extras import imports_of
from vjepa_jax.base.files import is_remote
from vjepa_jax.config.defaults import ConfigDict
from vjepa_jax.data.clips.frame_stream import FrameStream, whole_frame
from vjepa_jax.data.clips.media import Limits
from vjepa_jax.data.sources.open import open_videos
from vjepa_jax.data.sources.records import Source
from vjepa_jax.data.transforms.transforms import central_box
from vjepa_jax.evals import frozen
from vjepa_jax.evals.physics.surprise import Protocol, SurpriseMeter
from vjepa_jax.parallel import cluster
from vjepa_jax.run import checkpoint, cli

FOLDER = "surprise"
CROPS = {"whole": whole_frame, "central": central_box}
_MAX_NAMED = 20  # skipped videos on stderr; the others are in ranking.json


def make_stream(
    data: ConfigDict, resolution: int, fps: float, frame_step: int, crop: str
) -> FrameStream:
    """Make the reader of a video's frames.

    Args:
      data: of the run's config, for what is not given.
      resolution: side of the frames in pixels.
      fps: frames per second to use; 0: see `frame_step`.
      frame_step: one of so many frames is used; 0, and no `fps`: as in training.
      crop: one of `CROPS`.

    Raises:
      UserError: both `fps` and `frame_step` are given.
    """
    if fps and frame_step:
        raise UserError("give either --fps or --frame_step")
    if not fps and not frame_step:
        frame_step, fps = data.frame_step, data.fps
        if data.duration_secs:
            fps = data.num_frames / data.duration_secs
    limits = Limits(data.max_pixels, float("inf"))
    return FrameStream(resolution, frame_step, fps, CROPS[crop], data.resize, limits)


def open_source(path: str) -> Source:
    """Open the videos of --video; the UserError names the flag."""
    try:
        return open_videos(path)
    except UserError as error:
        message = str(error)
        if message.startswith("data.path"):
            message = "--video" + message.removeprefix("data.path")
        raise UserError(message) from None


def output_folder(output: str, workdir: str, video: str) -> pathlib.Path:
    """Return the folder of the results.

    Raises:
      UserError: it is remote, or inside of the folder of the videos, where films would
        be read the next time.
    """
    if not output and is_remote(workdir):
        raise UserError(f"--workdir={workdir} is remote: give a local --output")
    if is_remote(output):
        raise UserError(f"--output={output} is remote: give a local folder")
    folder = pathlib.Path(output or os.path.join(workdir, FOLDER)).absolute()
    for part in (video, *video.split(",")):
        given = pathlib.Path(part.strip())
        if given.is_dir() and folder.resolve().is_relative_to(given.resolve()):
            raise UserError(
                f"the results would be written to {folder}, inside of --video={part}: "
                "give another --output"
            )
    return folder


def main() -> None:
    """Run the command line."""
    cluster.require_one_process(os.environ)
    checkpoint.quiet_orbax()
    with imports_of("report"):
        from vjepa_jax.report import video_surprise
    workdir, video = _WORKDIR.value, _VIDEO.value
    folder = output_folder(_OUTPUT.value, workdir, video)
    outputs = video_surprise.Outputs(
        folder, tuple(filter(None, _WRITE.value)), _RANK_BY.value, _MAX_FILMS.value
    )
    source = open_source(video)
    model = frozen.load(workdir, _STEP.value)
    protocol = Protocol(
        _NUM_FRAMES.value,
        _STRIDE.value,
        (_CONTEXT_FRAMES.value,),
        _MASK_INDEX.value,
    )
    meter = SurpriseMeter(model, protocol, _RESOLUTION.value, _BATCH_SIZE.value)
    stream = make_stream(
        model.config.data,
        meter.resolution,
        _FPS.value,
        _FRAME_STEP.value,
        _CROP.value,
    )
    results = video_surprise.write_surprise(meter, source, stream, outputs)
    print(results.table().encode(errors="backslashreplace").decode())
    skipped = list(results.skipped.items())
    for path, reason in skipped[:_MAX_NAMED]:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    if skipped:
        print(f"{len(skipped)} of {len(source)} videos were skipped", file=sys.stderr)
    print(f"results in {folder}", file=sys.stderr)


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string(
        "workdir", None, "Folder of a run or of a conversion", required=True
    )
    _VIDEO = flags.DEFINE_string(
        "video",
        None,
        "Video file, folder, list file, or several separated by commas",
        required=True,
    )
    _OUTPUT = flags.DEFINE_string(
        "output", "", "Folder of the results; surprise in the workdir by default"
    )
    _STEP = flags.DEFINE_integer("step", None, "Saved step, by default the latest")
    _NUM_FRAMES = flags.DEFINE_integer(
        "num_frames", 0, "Frames of a window; 0: as in training", lower_bound=0
    )
    _CONTEXT_FRAMES = flags.DEFINE_integer(
        "context_frames",
        0,
        "First frames of a window, from which the others are predicted; 0: half",
        lower_bound=0,
    )
    _STRIDE = flags.DEFINE_integer(
        "stride", 0, "Frames from window to window; 0: a tubelet", lower_bound=0
    )
    _FPS = flags.DEFINE_float(
        "fps", 0.0, "Frames used per second; 0: as in training", lower_bound=0.0
    )
    _FRAME_STEP = flags.DEFINE_integer(
        "frame_step",
        0,
        "Use one of so many frames, instead of --fps",
        lower_bound=0,
    )
    _RESOLUTION = flags.DEFINE_integer(
        "resolution", 0, "Side of the frames, pixels; 0: as in training", lower_bound=0
    )
    _CROP = flags.DEFINE_enum(
        "crop", "whole", list(CROPS), "Part of the frame that becomes a square"
    )
    _MASK_INDEX = flags.DEFINE_integer(
        "mask_index", 0, "Mask token of the predictor", lower_bound=0
    )
    _BATCH_SIZE = flags.DEFINE_integer(
        "batch_size", 8, "Windows per call of the model", lower_bound=1
    )
    _RANK_BY = flags.DEFINE_enum(
        "rank_by", "mean", ["mean", "max"], "Of a video's windows"
    )
    _WRITE = flags.DEFINE_list(
        "write", ["plot", "films"], "Of plot, films and maps; the numbers always are"
    )
    _MAX_FILMS = flags.DEFINE_integer(
        "max_films", 16, "Films of the most surprising videos", lower_bound=1
    )
    cli.run(main)
