"""Examine every video of a source: which give clips, and why others do not.

Each video is examined in a worker process. A video that kills its worker or holds it
for too long costs that video only. Findings are kept as JSON lines and summed up in a
report.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence

import numpy as np

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips.media import DecodeError
from vjepa_jax.data.clips.reader import ClipReader, inspect
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.jobs.worker_pool import CRASHED, Failure, WorkerPool
from vjepa_jax.data.sources.records import Record, Source
from vjepa_jax.data.transforms.transforms import ClipTransform

_JSON_FIELDS = ("path", "frames", "width", "height", "fps", "codec", "error")
_LENGTHS_SECS = (0, 1, 2, 5, 10, 20, 60, 300, 1800)
_MAX_ROWS = 16
_MAX_LISTED = 20
_NAME_WIDTH = 16
_BAR = 40
# For these reasons the system's error message adds nothing.
_CLEAR_REASONS = ("empty", "missing")


@dataclasses.dataclass(frozen=True)
class Finding:
    """Properties of one video; None where they are not known.

    Attributes:
      path: names the video.
      frames, width, height, fps, codec: see `reader.VideoInfo`.
      error: None if it is readable, else one of `media.REASONS`, CRASHED, TIMED_OUT.
      detail: more about the error, in words.
      clip_secs: processor time that reading one clip took.
    """

    path: str
    frames: int | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    codec: str | None = None
    error: str | None = None
    detail: str = ""
    clip_secs: float | None = None


Examine = Callable[[Record], Finding]


@dataclasses.dataclass(frozen=True)
class Examination:
    """Inspect a video's packets, then read one clip of it as in training; picklable.

    Attributes:
      reader: of the clip, or clips.
      transform: its crop is that of the clip.
      deep: decode every frame as well.
    """

    reader: ClipReader
    transform: ClipTransform
    deep: bool

    def __call__(self, record: Record) -> Finding:
        """Examine one video; the finding of one that gives no clip has the reason."""
        # The same clip in every run, so that its outcome can be reproduced.
        rng = np.random.default_rng(0)
        crop = functools.partial(self.transform.crop_box, rng=rng)
        try:
            info = inspect(record, deep=self.deep, limits=self.reader.limits)
            start_secs = time.process_time()
            clips = self.reader.read(record, crop, rng)
        except DecodeError as error:
            # The message without the path, which the finding already holds.
            cause = error.__cause__
            detail = getattr(cause, "strerror", None) or ("" if cause else error.detail)
            return Finding(record.path, error=error.reason, detail=detail)
        return Finding(
            record.path,
            frames=info.frames,
            width=info.width,
            height=info.height,
            fps=info.fps,
            codec=info.codec,
            clip_secs=(time.process_time() - start_secs) / len(clips),
        )


def survey(
    source: Source,
    examine: Examine,
    indices: Iterable[int],
    *,
    num_workers: int,
    timeout_secs: float,
) -> Generator[tuple[int, Finding]]:
    """Examine videos in parallel; close the iterator to end the workers.

    Args:
      source: the videos; picklable, each worker gets a copy.
      examine: picklable, e.g. an `Examination`.
      indices: of the videos to examine.
      num_workers: processes, at least 1.
      timeout_secs: wall time after which a worker without a result is killed.

    Yields:
      index and finding of every video, in the order in which they are done.

    Raises:
      RuntimeError: a worker cannot be started.
    """
    pool = WorkerPool(_examine, source, examine, timeout_secs=timeout_secs)
    with contextlib.closing(pool.call_each(indices, num_workers)) as results:
        for index, result in results:
            if isinstance(result, Failure):
                path = source.path_of(index)
                result = Finding(path, error=result.reason, detail=result.detail)
            yield index, result


def _examine(source: Source, examine: Examine, index: int) -> Finding:
    try:
        return examine(source[index])
    except Exception as error:
        # A shard of the source may be damaged.
        reason = "unreadable" if isinstance(error, OSError) else CRASHED
        return Finding(source.path_of(index), error=reason, detail=repr(error))


class Output:
    """Findings as JSON lines: FILE.partial during the examination, FILE after it.

    The first line of the partial file identifies the examination. Its other lines are
    those of FILE in order of examination, each with the index of its video.

    Attributes:
      partial_path: path of the partial file.
      done: findings of an interrupted run by index, without `clip_secs`.
    """

    def __init__(self, path: str, asked_for: str):
        """Open the partial file, and read it if it exists.

        Args:
          path: FILE.
          asked_for: fingerprint of the videos and of how they are examined.

        Raises:
          UserError: FILE cannot be written, or the partial file has another
            fingerprint.
        """
        self.partial_path = path + ".partial"
        self.done: dict[int, Finding] = {}
        self._path = path
        try:
            os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
            if os.path.isdir(path):
                raise IsADirectoryError(f"{path} is a folder")
            self._file = open(self.partial_path, "a+")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"--output={path} cannot be written: {error}") from None
        wanted = {"asked_for": asked_for}
        self._file.seek(0)
        header = self._file.readline()
        if not header.endswith("\n"):
            self._file.truncate(0)
            self._write(wanted)
        elif header != json.dumps(wanted) + "\n":
            raise UserError(
                f"{self.partial_path} belongs to other videos or clips, or to another "
                "--deep: delete it, or give another --output"
            )
        else:
            self._read_done(len(header))

    def _read_done(self, end: int) -> None:
        for line in self._file:
            if not line.endswith("\n"):  # a killed run was writing it
                break
            end += len(line)
            fields = json.loads(line)
            index = fields.pop("index")
            self.done[index] = Finding(**fields)
        self._file.truncate(end)

    def _write(self, fields: dict) -> None:
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()

    def add(self, index: int, finding: Finding) -> None:
        """Append to the partial file."""
        fields = {name: getattr(finding, name) for name in _JSON_FIELDS}
        self._write({"index": index} | fields)

    def count(self) -> int:
        """Return the number of findings in the partial file."""
        self._file.seek(0)  # also writes what an interruption has left in the buffer
        return sum(line.endswith("\n") for line in self._file) - 1

    def finish(self) -> None:
        """Write FILE, in the order of the videos, and remove the partial file."""
        self._file.seek(0)
        self._file.readline()
        lines = sorted(
            (fields.pop("index"), json.dumps(fields))
            for fields in map(json.loads, self._file)
        )
        with files.renamed_when_complete(self._path) as part, part.open("w") as file:
            file.writelines(line + "\n" for _, line in lines)
        self._file.close()
        os.remove(self.partial_path)


class Summary:
    """Counts of the findings.

    Attributes:
      num_videos: examined videos.
      num_bad: unreadable ones.
    """

    def __init__(self, sampling: Sampling):
        """Start without findings; `sampling` decides which videos are too short."""
        self.num_videos = self.num_bad = 0
        spacing_secs, steps = sampling.spacing_secs, sampling.num_frames - 1
        self._window_frames = 1 + steps * sampling.frame_step
        self._window_secs = None if spacing_secs is None else steps * spacing_secs
        self._num_short = 0
        self._counts: dict[str, collections.Counter] = collections.defaultdict(
            collections.Counter
        )
        self._bad: list[Finding] = []
        self._clip_secs: list[float] = []

    @property
    def clips_per_second(self) -> float | None:
        """Clips that a core decodes per second; None if none was timed."""
        total = math.fsum(self._clip_secs)
        return len(self._clip_secs) / total if total else None

    def add(self, finding: Finding) -> None:
        """Count one video."""
        self.num_videos += 1
        if finding.error is not None:
            self.num_bad += 1
            self._counts["reason"][finding.error] += 1
            if len(self._bad) < _MAX_LISTED:
                self._bad.append(finding)
            return
        assert finding.frames is not None  # every readable video has it
        secs = finding.frames / finding.fps if finding.fps else None
        self._counts["codec"][finding.codec] += 1
        self._counts["size"][f"{finding.width}x{finding.height}"] += 1
        self._counts["fps"]["unknown" if secs is None else f"{finding.fps:.4g}"] += 1
        self._counts["length"][_length_bin(secs)] += 1
        if self._window_secs is None:
            self._num_short += finding.frames < self._window_frames
        else:
            self._num_short += secs is not None and secs < self._window_secs
        if finding.clip_secs is not None:
            self._clip_secs.append(finding.clip_secs)

    def lines(self) -> Iterator[str]:
        """Yield the report: totals, histograms and the first unreadable videos."""
        num_good = self.num_videos - self.num_bad
        videos = "1 video" if self.num_videos == 1 else f"{self.num_videos} videos"
        yield f"{videos}: {num_good} readable, {self.num_bad} not"
        for title in ("reason", "codec", "size", "fps"):
            counts = self._counts[title].most_common()
            if len(counts) > _MAX_ROWS:
                others = sum(count for _, count in counts[_MAX_ROWS - 1 :])
                counts[_MAX_ROWS - 1 :] = [("others", others)]
            yield from _histogram(title, counts)
        lengths = sorted(self._counts["length"].items())
        yield from _histogram("length", [(name, n) for (_, name), n in lengths])
        if self._num_short == 1:
            yield "\n1 video is shorter than a clip: its last frame is repeated"
        elif self._num_short:
            yield (
                f"\n{self._num_short} videos are shorter than a clip: their last frame "
                "is repeated"
            )
        if self._bad:
            cut = self.num_bad > len(self._bad)
            first = f", the first {len(self._bad)} of {self.num_bad}" if cut else ""
            yield f"\nunreadable{first}"
        for finding in self._bad:
            is_clear = finding.error in _CLEAR_REASONS or not finding.detail
            detail = "" if is_clear else f" ({finding.detail})"
            yield f"  {finding.path}: {finding.error}{detail}"


def _length_bin(secs: float | None) -> tuple[float, str]:
    if secs is None:
        return math.inf, "unknown"
    i = sum(secs >= low for low in _LENGTHS_SECS)
    low, high = _LENGTHS_SECS[i - 1], (*_LENGTHS_SECS, None)[i]
    return low, f"{low} to {high} s" if high else f"from {low} s"


def _histogram(title: str, counts: Sequence[tuple[str, int]]) -> Iterator[str]:
    total = sum(count for _, count in counts)
    if total:
        yield f"\n{title:<{_NAME_WIDTH + 2}} {'videos':>9}  share"
    for name, count in counts:
        bar = "#" * math.ceil(_BAR * count / total)
        yield f"  {name:<{_NAME_WIDTH}} {count:>9} {count / total:6.1%} {bar}"
