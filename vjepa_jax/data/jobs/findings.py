"""What is known of examined videos: kept as JSON lines, and summed up in a report."""

import collections
import json
import math
import os
from collections.abc import Iterator, Sequence

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.jobs import survey

_JSON_FIELDS = ("path", "frames", "width", "height", "fps", "codec", "error")
_LENGTHS_SECS = (0, 1, 2, 5, 10, 20, 60, 300, 1800)
_MAX_ROWS = 16
_MAX_LISTED = 20
_NAME_WIDTH = 16
_BAR = 40
_TOLD_BY_REASON = ("empty", "missing")  # what the system says is the same once more


class Output:
    """JSON lines about videos: FILE once it is complete, until then FILE.partial.

    The partial file starts with a line about what was asked for. Its other lines are
    those of FILE in order of examination, each with the index of its video.

    Attributes:
      partial_path: path of the partial file.
      done: findings of an interrupted run by index; they lack `clip_secs`.
    """

    def __init__(self, path: str, asked_for: str):
        """Opens the files.

        Args:
          path: FILE.
          asked_for: identifies the videos and how they are looked at.

        Raises:
          UserError: FILE cannot be written, or the partial file is of something else.
        """
        self.partial_path = path + ".partial"
        self.done = {}
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
                f"{self.partial_path} is of other videos or clips, or was made with "
                "another --deep: delete it, or give another --output"
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
            self.done[index] = survey.Finding(**fields)
        self._file.truncate(end)

    def _write(self, fields: dict) -> None:
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()

    def add(self, index: int, finding: survey.Finding) -> None:
        """Appends to the partial file."""
        self._write({"index": index} | _json_fields(finding))

    def finish(self) -> None:
        """Writes FILE, in the order of the videos, and removes the partial file."""
        self._file.seek(0)
        self._file.readline()
        lines = sorted(
            (fields.pop("index"), json.dumps(fields))
            for fields in map(json.loads, self._file)
        )
        temporary = self._path + ".tmp"
        with open(temporary, "w") as file:
            file.writelines(line + "\n" for _, line in lines)
        os.replace(temporary, self._path)
        self._file.close()
        os.remove(self.partial_path)


def _json_fields(finding: survey.Finding) -> dict:
    return {name: getattr(finding, name) for name in _JSON_FIELDS}


class Summary:
    """What the findings come to.

    Attributes:
      num_videos: videos looked at.
      num_bad: unreadable ones.
    """

    def __init__(self, sampling: Sampling):
        """Takes how clips are sampled, to tell which videos are too short."""
        self.num_videos = self.num_bad = 0
        spacing_secs, steps = sampling.spacing_secs, sampling.num_frames - 1
        self._window_frames = 1 + steps * sampling.frame_step
        self._window_secs = None if spacing_secs is None else steps * spacing_secs
        self._num_short = 0
        self._counts = collections.defaultdict(collections.Counter)
        self._bad = []
        self._clip_secs = []

    @property
    def clips_per_second(self) -> float | None:
        """Clips that a core decodes per second; None if that was not measured."""
        total = math.fsum(self._clip_secs)
        return len(self._clip_secs) / total if total else None

    def add(self, finding: survey.Finding) -> None:
        """Takes note of one video."""
        self.num_videos += 1
        if finding.error is not None:
            self.num_bad += 1
            self._counts["reason"][finding.error] += 1
            if len(self._bad) < _MAX_LISTED:
                self._bad.append(finding)
            return
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
        """Yields the report: totals, histograms and the first unreadable videos."""
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
            is_told = finding.error in _TOLD_BY_REASON or not finding.detail
            detail = "" if is_told else f" ({finding.detail})"
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
