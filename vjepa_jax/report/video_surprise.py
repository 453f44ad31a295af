"""Measure how much videos surprise a model, and write what was found.

The folder gets `ranking.json`, `windows.jsonl`, `surprise.png`, and for each video a
film with the heat map of its surprise beside it, and the heat maps as arrays.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips.frame_stream import FrameStream, TimedFrame
from vjepa_jax.data.clips.media import DecodeError
from vjepa_jax.data.clips.reader import take_record
from vjepa_jax.data.sources.records import Source
from vjepa_jax.evals.physics.surprise import SurpriseMeter
from vjepa_jax.report.surprise_pictures import FrameMaps, draw_curves, write_film

RANKING, WINDOWS, PLOT = "ranking.json", "windows.jsonl", "surprise.png"
FILMS, MAPS = "films", "maps"
OUTPUTS = ("plot", "films", "maps")
RANKINGS = ("mean", "max")

_MAX_NAME = 80  # characters of a file's name
_MAX_SAMPLED = 256  # windows of a video from which the colours' range is taken
_PERCENTILES = (2, 99.8)  # of the errors: the range of the colours


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What is written, and where.

    Attributes:
      folder: local folder.
      kinds: of `OUTPUTS`; `ranking.json` and `windows.jsonl` are always written.
      rank_by: one of `RANKINGS`, over the windows of a video.
      max_films: films of so many videos, the most surprising ones.
    """

    folder: pathlib.Path
    kinds: tuple[str, ...] = ("plot", "films")
    rank_by: str = "mean"
    max_films: int = 16

    def __post_init__(self):
        """Refuse unknown names."""
        unknown = [kind for kind in self.kinds if kind not in OUTPUTS]
        if unknown:
            raise UserError(
                f"--write={unknown[0]!r} is not known: give some of "
                f"{', '.join(OUTPUTS)}"
            )


@dataclasses.dataclass(frozen=True)
class Measured:
    """The surprise of one video.

    Attributes:
      index: of the video in its source.
      path: of the video.
      name: of its files, without suffix; no two videos have the same.
      spans: float64 [n, 3], of each window the seconds of its first frame, of the first
        predicted frame and of the last frame.
      times: float64 [n], middle of each window's predicted frames, in seconds.
      surprise: float32 [n], mean L1 error of each window.
      spool: file of the errors of all tokens, float32 [n, T', H', W'] without a header.
      map_shape: (n, T', H', W').
    """

    index: int
    path: str
    name: str
    spans: np.ndarray
    times: np.ndarray
    surprise: np.ndarray
    spool: pathlib.Path
    map_shape: tuple[int, int, int, int]

    @property
    def mean(self) -> float:
        """Mean surprise over windows."""
        return float(self.surprise.mean(dtype=np.float64))

    @property
    def max(self) -> float:
        """Largest surprise of a window."""
        return float(self.surprise.max())

    @property
    def time_of_max(self) -> float:
        """Time of the window with the largest surprise, in seconds."""
        return float(self.times[self.surprise.argmax()])

    def maps(self) -> np.ndarray:
        """Return the errors as an array on disk: float32 [n, T', H', W']."""
        return np.memmap(self.spool, np.float32, "r", shape=self.map_shape)


@dataclasses.dataclass(frozen=True)
class Results:
    """The videos from the most to the least surprising, and those that were skipped.

    Attributes:
      ranked: measured videos.
      skipped: {path: why}.
    """

    ranked: list[Measured]
    skipped: dict[str, str]

    def table(self) -> str:
        """Return the ranking as a table with a line per video."""
        columns = f"{'mean':>9} {'max':>9} {'max at (s)':>11} {'windows':>8}"
        rows = [f"rank {columns}  video"]
        for rank, video in enumerate(self.ranked, start=1):
            rows.append(
                f"{rank:>4} {video.mean:>9.4f} {video.max:>9.4f} "
                f"{video.time_of_max:>11.2f} {len(video.times):>8}  {video.path}"
            )
        return "\n".join(rows)


def write_surprise(
    meter: SurpriseMeter, source: Source, stream: FrameStream, outputs: Outputs
) -> Results:
    """Measure videos, rank them, and write the results.

    Args:
      meter: measures windows.
      source: the videos.
      stream: how their frames are read; its resolution is the meter's.
      outputs: what is written.

    Raises:
      UserError: none of the videos can be measured, a package is missing, or the folder
        cannot be written.
    """
    folder = outputs.folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".maps-") as spools:
            results = _measure_all(meter, source, stream, pathlib.Path(spools))
            _require_some(results, source)
            results.ranked.sort(key=lambda v: getattr(v, outputs.rank_by), reverse=True)
            _write_numbers(meter, results, stream, outputs)
            if "plot" in outputs.kinds:
                curves = {v.name: (v.times, v.surprise) for v in results.ranked}
                draw_curves(curves, folder / PLOT)
            if "maps" in outputs.kinds:
                (folder / MAPS).mkdir(exist_ok=True)
                for video in results.ranked:
                    _write_maps(video, folder / MAPS / f"{video.name}.npz")
            if "films" in outputs.kinds:
                _write_films(meter, source, stream, results.ranked, outputs)
    except DecodeError as error:  # of a video that was readable before
        raise UserError(
            f"{error}: its film cannot be made; repeat the command"
        ) from None
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror}") from None
    return results


def _measure_all(
    meter: SurpriseMeter, source: Source, stream: FrameStream, spools: pathlib.Path
) -> Results:
    results, names = Results([], {}), _names(source)
    length = meter.protocol.num_frames
    with tqdm.tqdm(total=len(source), unit="video", disable=None) as progress:
        for index, name in enumerate(names):
            path = source.path_of(index)
            spool = spools / f"{index}.f32"
            try:
                video = _measure(meter, source, index, name, stream, spool)
            except DecodeError as error:
                results.skipped[path] = str(error).removeprefix(f"{path}: ")
            else:
                if isinstance(video, int):
                    results.skipped[path] = (
                        f"too short ({video} of the {length} frames of a window)"
                    )
                else:
                    results.ranked.append(video)
            progress.update()
    return results


def _measure(
    meter: SurpriseMeter,
    source: Source,
    index: int,
    name: str,
    stream: FrameStream,
    spool: pathlib.Path,
) -> Measured | int:
    """Measure a video; return its number of frames if it is too short."""
    record = take_record(source, index)
    num_frames = 0

    def counted() -> Iterator[TimedFrame]:
        nonlocal num_frames
        for item in stream.read(record):
            num_frames += 1
            yield item

    spans, times, values, shape = [], [], [], (0, 0, 0)
    with spool.open("wb") as file:
        windows = meter.windows(counted())
        for window in tqdm.tqdm(
            windows, name, unit="window", leave=False, disable=None
        ):
            file.write(window.errors.tobytes())
            ends = (0, window.num_context, -1)
            spans.append([window.times[i] for i in ends])
            times.append(window.time)
            values.append(window.surprise)
            shape = window.errors.shape
    if not values:
        spool.unlink()
        return num_frames
    return Measured(
        index,
        record.path,
        name,
        np.array(spans),
        np.array(times),
        np.array(values, np.float32),
        spool,
        (len(values), *shape),
    )


def _names(source: Source) -> list[str]:
    """Return a different file name, without suffix, for each video."""
    names: dict[str, None] = {}
    for index in range(len(source)):
        stem = os.path.splitext(os.path.basename(source.path_of(index)))[0]
        stem = re.sub(r"[^\w.-]+", "_", stem).strip(".")[:_MAX_NAME] or "video"
        name, number = stem, 1
        while name in names:
            number += 1
            name = f"{stem}_{number}"
        names[name] = None
    return list(names)


def _require_some(results: Results, source: Source) -> None:
    if not results.ranked:
        path, reason = next(iter(results.skipped.items()))
        raise UserError(
            f"none of the {len(source)} videos can be measured; the first is "
            f"{path}: {reason}"
        )


def _write_numbers(
    meter: SurpriseMeter, results: Results, stream: FrameStream, outputs: Outputs
) -> None:
    settings: dict[str, Any] = dataclasses.asdict(meter.protocol)
    settings |= {"context_frames": meter.protocol.context_frames[0]}
    settings |= {"resolution": meter.resolution, "rank_by": outputs.rank_by}
    settings |= (
        {"frame_step": stream.frame_step} if stream.frame_step else {"fps": stream.fps}
    )
    videos = [
        {
            "rank": rank,
            "video": v.path,
            "mean": v.mean,
            "max": v.max,
            "time_of_max": v.time_of_max,
            "windows": len(v.times),
            "files": v.name,
        }
        for rank, v in enumerate(results.ranked, start=1)
    ]
    found = {"settings": settings, "videos": videos, "skipped": results.skipped}
    files.write_whole(outputs.folder / RANKING, json.dumps(found, indent=2) + "\n")
    with (
        files.renamed_when_complete(outputs.folder / WINDOWS) as part,
        part.open("w") as lines,
    ):
        for video in results.ranked:
            rows = zip(video.spans.tolist(), video.times, video.surprise, strict=True)
            for number, (span, time, value) in enumerate(rows):
                row = {"video": video.path, "window": number}
                row |= dict(zip(("start", "predicted_from", "end"), span, strict=True))
                row |= {"time": float(time), "surprise": float(value)}
                lines.write(json.dumps(row) + "\n")


def _write_maps(video: Measured, path: pathlib.Path) -> None:
    """Write times, surprise and maps as an .npz, without reading maps into memory."""
    arrays = {"times": video.times, "surprise": video.surprise}
    header = {"descr": "<f4", "fortran_order": False, "shape": video.map_shape}
    with (
        files.renamed_when_complete(path) as part,
        zipfile.ZipFile(str(part), "w", allowZip64=True) as archive,
    ):
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.lib.format.write_array(file, array)
        with (
            archive.open(f"{MAPS}.npy", "w", force_zip64=True) as file,
            video.spool.open("rb") as spool,
        ):
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(spool, file)


def _write_films(
    meter: SurpriseMeter,
    source: Source,
    stream: FrameStream,
    ranked: Sequence[Measured],
    outputs: Outputs,
) -> None:
    chosen = ranked[: outputs.max_films]
    scale = _colour_range(chosen)
    (outputs.folder / FILMS).mkdir(exist_ok=True)
    (context,) = meter.protocol.context_frames
    for video in tqdm.tqdm(chosen, unit="film", disable=None):
        # Read once more: the frames of a long video do not fit into memory.
        record = take_record(source, video.index)
        write_film(
            outputs.folder / FILMS / f"{video.name}.mp4",
            record,
            stream,
            FrameMaps(
                video.maps(),
                meter.protocol.stride,
                context,
                meter.model.encoder.tubelet_size,
            ),
            (video.times, video.surprise),
            scale,
        )


def _colour_range(videos: Iterable[Measured]) -> tuple[float, float]:
    """Return the errors that have the darkest and the brightest colour in all films."""
    sampled = []
    for video in videos:
        step = -(-len(video.times) // _MAX_SAMPLED)
        sampled.append(np.asarray(video.maps()[::step]).ravel())
    low, high = np.percentile(np.concatenate(sampled), _PERCENTILES)
    return float(low), float(high)
