"""Encode a list of videos into shards, as an Apache Beam pipeline.

The unit of work is a shard. It is written under a temporary name and renamed when it is
complete; a `.json` note beside it, written last, describes it. A run that was stopped
continues with the missing shards. The output folder holds all that a worker needs, so
that the pipeline itself is a few numbers for any count of videos.

Beam needs one process per machine: its threads wait for the processes of a
`WorkerPool`, which encode. If one of Beam's own local processes dies, Beam hangs.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import io
import json
import logging
import math
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import tqdm
from etils import epath

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips.media import DecodeError
from vjepa_jax.data.jobs.reencode import (
    TIME_LIMIT_SECS,
    EncodedVideo,
    Encoding,
    reencode,
)
from vjepa_jax.data.jobs.worker_pool import CRASHED, Failure, WorkerPool
from vjepa_jax.data.sources import shards
from vjepa_jax.data.sources.file_lists import VideoList

if TYPE_CHECKING:
    from apache_beam.options.pipeline_options import PipelineOptions

# Files of an incomplete folder: the job, and its videos.
_JOB = f"{shards.MANIFEST}.part"
_INPUTS = "inputs.npz"

# A stopped run loses up to a shard per worker; too many shards are slow to open.
_MAX_RECORDS_PER_SHARD = 512
_MIN_RECORDS_PER_SHARD = 4
_NUM_SHARDS_TO_SPREAD = 64

# Wall time for one video: a read that hangs takes no processor time.
_TIMEOUT_SECS = 2 * TIME_LIMIT_SECS

# The part of Beam's DirectRunner that runs in Python; what DirectRunner tries first
# downloads a binary.
_LOCAL_RUNNER = "apache_beam.runners.portability.fn_api_runner.FnApiRunner"
_LOCAL_DEFAULTS = (
    "--direct_running_mode=multi_threading",
    "--direct_num_workers=0",  # one per core
)


@dataclasses.dataclass(frozen=True)
class Job:
    """The videos and how to encode them; two runs of one job share their shards.

    Attributes:
      source: the list or folder, for messages.
      inputs: digest of its paths and labels.
      num_inputs: number of videos.
      num_shards: number of files for them, in order.
      encoding: of the videos.
    """

    source: str
    inputs: str
    num_inputs: int
    num_shards: int
    encoding: Encoding

    def to_json(self) -> dict:
        """Return the beginning of the manifest."""
        fields = dataclasses.asdict(self)
        settings = fields.pop("encoding")
        return {"format": shards.FORMAT, **fields, "settings": settings}

    @classmethod
    def from_json(cls, content: dict) -> "Job":
        """Read `to_json`'s fields; raise KeyError or TypeError if there are none."""
        names = "source", "inputs", "num_inputs", "num_shards"
        fields = {name: content[name] for name in names}
        return cls(**fields, encoding=Encoding(**content["settings"]))

    @property
    def key(self) -> str:
        """Digest of all that the shards depend on, except the bytes of the videos."""
        content = json.dumps(self.to_json(), sort_keys=True)
        return shards.digest_of([content.encode()])

    def shard_names(self) -> list[str]:
        """Return the names of all shards, without suffixes."""
        return [shards.shard_name(i, self.num_shards) for i in range(self.num_shards)]

    def inputs_of(self, shard: int) -> range:
        """Return the indices of a shard's inputs."""
        start, stop = (
            i * self.num_inputs // self.num_shards for i in (shard, shard + 1)
        )
        return range(start, stop)


def prepare(
    source: VideoList,
    output: str,
    encoding: Encoding,
    *,
    num_shards: int = 0,
    max_bad_fraction: float = 0.05,
    retry_failures: bool = False,
    beam_options: Sequence[str] = (),
) -> dict:
    """Write the missing shards of `source` in the folder `output`.

    Args:
      source: the videos and images.
      output: a local or remote folder; made if missing.
      encoding: how to encode them.
      num_shards: 0 chooses by the number of videos.
      max_bad_fraction: largest share of the videos that may fail.
      retry_failures: write shards again that lack a video.
      beam_options: see `run_on_beam`.

    Returns:
      The manifest.

    Raises:
      UserError: the folder holds other shards or cannot be written, or too many videos
        failed.
    """
    folder, class_names = epath.Path(output), source.class_names
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--output={output} is not a folder") from None
    except OSError as error:
        raise UserError(f"--output={output} cannot be made: {error}") from None
    previous = _previous_job(folder)
    if not num_shards and previous is not None:
        num_shards = previous.num_shards
    num_shards = num_shards or _num_shards_of_notes(folder)
    num_shards = num_shards or default_num_shards(len(source))
    num_shards = min(num_shards, len(source))  # no shard is empty
    job = Job(source.name, source.digest(), len(source), num_shards, encoding)
    if previous is not None:
        _check_same(output, previous, job)
    else:
        _check_notes(folder, job)
    inputs, content = io.BytesIO(), json.dumps(job.to_json(), indent=1)
    arrays = {"root": np.array(os.fsencode(source.root)), **source.to_arrays()}
    # mypy takes `**` for `allow_pickle` as well.
    np.savez(inputs, **arrays)  # type: ignore[arg-type]
    try:
        files.write_whole(folder / _INPUTS, inputs.getvalue())
        files.write_whole(folder / _JOB, content.encode())
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error}") from None
    # Removed until all shards are complete, since the run may end before that.
    (folder / shards.MANIFEST).unlink(missing_ok=True)
    if retry_failures:
        notes = _read_notes(folder, job)
        for name, note in zip(job.shard_names(), notes, strict=True):
            if note and note["failures"]:
                (folder / f"{name}.json").unlink()
    try:
        with _progress(job, output):
            run_on_beam(
                functools.partial(encode_shard, output, job.key),
                range(job.num_shards),
                beam_options,
            )
    finally:
        end_encoders()
    for leftover in (*folder.glob(".*-*.part"), folder / _INPUTS):
        leftover.unlink(missing_ok=True)
    manifest = _finish(job, folder, max_bad_fraction, class_names)
    (folder / _JOB).unlink()
    return manifest


def default_num_shards(num_inputs: int) -> int:
    """Return 64 shards for 250 to 33000 videos, fewer for fewer, more for more."""
    spread = min(math.ceil(num_inputs / _MIN_RECORDS_PER_SHARD), _NUM_SHARDS_TO_SPREAD)
    return max(1, spread, math.ceil(num_inputs / _MAX_RECORDS_PER_SHARD))


def encode_shard(output: str, key: str, shard: int) -> None:
    """Write one shard unless it is complete; a Beam worker calls this.

    Args:
      output: folder with the job's description.
      key: `Job.key`.
      shard: number of the shard.
    """
    job, source = _read_job(output, key)
    folder, name = epath.Path(output), shards.shard_name(shard, job.num_shards)
    path = folder / f"{name}{shards.SUFFIX}"
    note = _read_note(folder, name, key)
    if note is not None and shards.checksum(str(path)) == note["sha256"]:
        return
    records, failures = [], []

    def encoded() -> Iterator[shards.VideoRecord]:
        for index in job.inputs_of(shard):
            record = source[index]
            video = reencode_apart(record.path, job.encoding)
            if isinstance(video, Failure):
                failures.append({"path": record.path, **dataclasses.asdict(video)})
                continue
            records.append([source.entry(index), record.label, video.num_frames])
            yield shards.VideoRecord(
                video=video.content,
                label=record.label,
                id=source.entry(index),
                path=record.path,
                fps=video.fps,
                num_frames=video.num_frames,
                width=video.width,
                height=video.height,
            )

    with _local_name(path) as temporary:
        shards.write_shard(temporary, encoded())
        note = {
            "job": key,
            "num_bytes": os.path.getsize(temporary),
            "sha256": shards.checksum(temporary),
            "records": records,
            "failures": failures,
        }
    files.write_whole(folder / f"{name}.json", json.dumps(note).encode())


def reencode_apart(path: str, encoding: Encoding) -> EncodedVideo | Failure:
    """Encode a video in another process; threads may do so at the same time.

    Returns:
      The video, or a failure whose reason is one of `media.REASONS`, CRASHED or
      TIMED_OUT.

    Raises:
      RuntimeError: a process cannot be started.
    """
    return _encoders().call((path, encoding))


def end_encoders() -> None:
    """End the processes that encode."""
    _encoders().close()
    _encoders.cache_clear()


@functools.lru_cache(maxsize=1)
def _encoders() -> WorkerPool:
    """Return the pool of this process, which all threads share."""
    return WorkerPool(_encode, timeout_secs=_TIMEOUT_SECS)


def _encode(arguments: tuple[str, Encoding]) -> EncodedVideo | Failure:
    try:
        return reencode(*arguments)
    except DecodeError as error:
        return Failure(error.reason, error.detail)
    except Exception as error:
        return Failure(CRASHED, repr(error))


@functools.lru_cache(maxsize=1)
def _read_job(output: str, key: str) -> tuple[Job, VideoList]:
    """Read the job and its videos, once per process."""
    folder = epath.Path(output)
    job = Job.from_json(json.loads((folder / _JOB).read_text()))
    if job.key != key:
        raise RuntimeError(f"another job has begun in {output}")
    with np.load(io.BytesIO((folder / _INPUTS).read_bytes())) as arrays:
        root = os.fsdecode(arrays["root"].item())
        return job, VideoList.from_arrays(job.source, root, arrays)


@contextlib.contextmanager
def _local_name(path: epath.Path) -> Iterator[str]:
    """Yield a local name to write to; the file then appears at `path` atomically."""
    with files.renamed_when_complete(path) as part:
        if not files.is_remote(path):
            yield str(part)
            return
        with tempfile.TemporaryDirectory() as scratch:  # ArrayRecord writes local files
            local = os.path.join(scratch, path.name)
            yield local
            with open(local, "rb") as source, part.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 22)


@contextlib.contextmanager
def _progress(job: Job, output: str) -> Iterator[None]:
    """Show how many shards are complete, by their files: Beam does not report it."""
    stop = threading.Event()
    names = {f"{name}.json" for name in job.shard_names()}

    def count() -> int:
        return sum(path.name in names for path in epath.Path(output).iterdir())

    def watch() -> None:
        with tqdm.tqdm(total=len(names), desc="preparing", unit=" shards") as bar:
            while not stop.wait(5.0):
                bar.update(count() - bar.n)
            bar.update(count() - bar.n)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _finish(
    job: Job,
    folder: epath.Path,
    max_bad_fraction: float,
    class_names: Sequence[str] | None,
) -> dict:
    """Write failures, index and, last, the manifest."""
    names, notes = job.shard_names(), []
    for name, note in zip(names, _read_notes(folder, job), strict=True):
        if note is None:
            raise RuntimeError(f"the pipeline ended without the shard {name}")
        notes.append(note)
    failures = [failure for note in notes for failure in note["failures"]]
    lines = "".join(json.dumps(failure) + "\n" for failure in failures)
    files.write_whole(folder / shards.FAILURES, lines.encode())
    listed = f"{len(failures)} of {job.num_inputs} videos failed, listed in " + repr(
        str(folder / shards.FAILURES)
    )
    if len(failures) == job.num_inputs:
        raise UserError(
            f"{listed}: no video could be encoded; fix them and run again with "
            "--retry_failures"
        )
    if len(failures) > max_bad_fraction * job.num_inputs:
        raise UserError(
            f"{listed}, more than --max_bad_fraction={max_bad_fraction:g} allows: "
            "allow more, or fix them and add --retry_failures; then run again, "
            "finished shards are kept"
        )
    records = (record for note in notes for record in note["records"])
    manifest = {
        **job.to_json(),
        "num_records": job.num_inputs - len(failures),
        "num_failures": len(failures),
        "index": shards.write_index(str(folder), records),
        shards.CLASS_NAMES: class_names and list(class_names),
        "shards": [
            {
                "name": name,
                "num_records": len(note["records"]),
                "num_bytes": note["num_bytes"],
                "sha256": note["sha256"],
            }
            for name, note in zip(names, notes, strict=True)
        ],
    }
    content = json.dumps(manifest, indent=1).encode()
    files.write_whole(folder / shards.MANIFEST, content)
    return manifest


def _previous_job(folder: epath.Path) -> Job | None:
    """Return the job that the folder was made by; None if no file holds it."""
    for name in (shards.MANIFEST, _JOB):
        path = folder / name
        try:
            return Job.from_json(json.loads(path.read_text()))
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            if not _num_shards_of_notes(folder):
                raise UserError(
                    f"{str(path)!r} does not belong to shards of this program: give "
                    "another --output"
                ) from None
    return None


def _num_shards_of_notes(folder: epath.Path) -> int:
    """Return the number of shards by the name of a note; 0 without notes."""
    for path in folder.glob("shard-*.json"):
        if match := re.fullmatch(r"shard-\d+-of-(\d+)\.json", path.name):
            return int(match[1])
    return 0


def _check_notes(folder: epath.Path, job: Job) -> None:
    """Raise if the folder holds notes of another job, and no description of it."""
    for path in folder.glob("shard-*.json"):
        try:
            is_of_job = json.loads(path.read_text())["job"] == job.key
        except (ValueError, KeyError, TypeError):
            continue  # a damaged one, whose shard will be written again
        if not is_of_job:
            raise UserError(
                f"{str(path)!r} belongs to other shards: give the --data and the flags "
                "that they were made with, or another --output, or remove the folder"
            )


def _check_same(output: str, previous: Job, job: Job) -> None:
    """Raise if the folder was made by another job, naming the difference."""
    if previous.key == job.key:
        return
    if (previous.inputs, previous.num_inputs) != (job.inputs, job.num_inputs):
        difference = (
            f"of other videos ({previous.num_inputs} of {previous.source!r}, now "
            f"{job.num_inputs} of {job.source!r})"
        )
    elif previous.source != job.source:
        difference = (
            f"of {previous.source!r}; its list equals that of {job.source!r}, but the "
            "videos may differ"
        )
    else:
        old, new = (
            {"num_shards": j.num_shards, **dataclasses.asdict(j.encoding)}
            for j in (previous, job)
        )
        difference = "made with " + ", ".join(
            f"{key}={old[key]}, not {new[key]}" for key in old if old[key] != new[key]
        )
    raise UserError(
        f"--output={output} holds shards {difference}: give another --output, or "
        "remove the folder"
    )


def _read_note(folder: epath.Path, name: str, key: str) -> dict | None:
    """Return the note of a shard whose file has the noted size; None otherwise."""
    try:
        note = json.loads((folder / f"{name}.json").read_text())
        size = (folder / f"{name}{shards.SUFFIX}").stat().length
        is_complete = (note["job"], note["num_bytes"]) == (key, size)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return note if is_complete else None


def _read_notes(folder: epath.Path, job: Job) -> list[dict | None]:
    """Return the notes of all shards, see `_read_note`."""
    read = functools.partial(_read_note, folder, key=job.key)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # remote reads wait
        return list(pool.map(read, job.shard_names()))


def run_on_beam(
    work: Callable[[int], None], numbers: range, options: Sequence[str]
) -> None:
    """Call `work` with every number, in any order, on any Beam runner.

    Args:
      work: picklable; may be called twice with a number, even at the same time.
      numbers: its arguments.
      options: of Beam, as on its command lines; by default the numbers are spread over
        the cores of this machine.

    Raises:
      UserError: Beam is not installed, or rejects the options.
    """
    logging.getLogger("apache_beam").setLevel(logging.ERROR)  # no log of its stages
    try:
        with _no_warnings():  # that Google's clients are missing, which few users need
            import apache_beam as beam
    except ImportError as error:
        raise UserError(
            f"preparing shards needs Apache Beam ({error}): pip install "
            "'vjepa_jax[prepare]'"
        ) from error
    parsed = _parse_options(options)
    try:
        pipeline = beam.Pipeline(options=parsed)
    except (ValueError, ImportError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Beam rejects the options after --: {reason}") from error
    with pipeline:
        created = pipeline | beam.Create(numbers, reshuffle=True)
        _ = created | beam.Map(work)


def _parse_options(options: Sequence[str]) -> "PipelineOptions":
    """Return Beam's options, completed for a local run."""
    from apache_beam.options.pipeline_options import (
        DirectOptions,
        PipelineOptions,
        StandardOptions,
    )

    messages = io.StringIO()
    parsed = PipelineOptions([*options])
    try:
        with contextlib.redirect_stderr(messages), _no_warnings():
            known = parsed.get_all_options()
            unknown = parsed.get_all_options(retain_unknown_options=True).keys() - known
            runner = parsed.view_as(StandardOptions).runner
            mode = parsed.view_as(DirectOptions).direct_running_mode
    except SystemExit:
        reason = messages.getvalue().strip().rsplit("error: ", 1)[-1]
        raise UserError(f"Beam rejects the options after --: {reason}") from None
    if runner not in (None, "DirectRunner"):
        return parsed  # it may know more options than Beam does
    if unknown:
        raise UserError(f"Beam has no option --{min(unknown)}, given after --")
    if mode == "multi_processing":
        raise UserError(
            "--direct_running_mode=multi_processing is not supported: every video is "
            "encoded in its own process anyway, --direct_num_workers at a time"
        )
    return PipelineOptions([*_LOCAL_DEFAULTS, *options, f"--runner={_LOCAL_RUNNER}"])


@contextlib.contextmanager
def _no_warnings() -> Iterator[None]:
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)
