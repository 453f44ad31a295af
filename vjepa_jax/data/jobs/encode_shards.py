"""Encodes a list of videos into shards, as an Apache Beam pipeline.

The unit of work is a shard: it is written under a temporary name, renamed when whole,
and noted in a `.json` beside it, written last. A run that was stopped goes on with the
shards that are missing. Everything that a worker needs lies in the output folder, so
that the pipeline itself is a few numbers for any count of videos.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence

import numpy as np
import tqdm
from etils import epath

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.jobs import beam_job, shard_job
from vjepa_jax.data.jobs.encoders import Failure, end_children, reencode_apart
from vjepa_jax.data.jobs.reencode import Encoding
from vjepa_jax.data.jobs.shard_job import Job
from vjepa_jax.data.sources import shards
from vjepa_jax.data.sources.file_lists import VideoList, is_remote


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
    """Writes what is missing of the shards of `source` in the folder `output`.

    Args:
      source: the videos and images.
      output: a local or remote folder; made if missing.
      encoding: how to encode them.
      num_shards: 0 chooses by the number of videos.
      max_bad_fraction: share of the videos that may fail.
      retry_failures: write shards anew that lack a video.
      beam_options: see `beam_job.run`.

    Returns:
      The manifest.

    Raises:
      UserError: the folder holds other shards, cannot be written, or too many videos
        failed.
    """
    folder = epath.Path(output)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"--output={output} is not a folder") from None
    except OSError as error:
        raise UserError(f"--output={output} cannot be made: {error}") from None
    previous = shard_job.previous_job(folder)
    if not num_shards:
        is_known = previous is not None
        there = previous.num_shards if is_known else shard_job.num_noted_shards(folder)
        num_shards = there or shard_job.default_num_shards(len(source))
    # No shard without a video, which would be a file for nothing.
    num_shards = min(num_shards, len(source))
    job = Job(source.name, source.digest(), len(source), num_shards, encoding)
    if previous is not None:
        shard_job.check_same(output, previous, job)
    else:
        shard_job.check_notes(folder, job)
    inputs, content = io.BytesIO(), json.dumps(job.to_json(), indent=1)
    np.savez(inputs, root=np.array(os.fsencode(source.root)), **source.to_arrays())
    try:
        shards.write_whole(folder / shard_job.INPUTS, inputs.getvalue())
        shards.write_whole(folder / shard_job.JOB, content.encode())
    except OSError as error:
        raise UserError(f"--output={output} cannot be written: {error}") from None
    # Until all is there once more; a run may end at any time.
    (folder / shards.MANIFEST).unlink(missing_ok=True)
    if retry_failures:
        notes = shard_job.read_notes(folder, job)
        for name, note in zip(job.shard_names(), notes, strict=True):
            if note and note["failures"]:
                (folder / f"{name}.json").unlink()
    try:
        with _progress(job, output):
            beam_job.run(
                functools.partial(encode_shard, output, job.key),
                range(job.num_shards),
                beam_options,
            )
    finally:
        end_children()
    for leftover in (*folder.glob(".*-*.part"), folder / shard_job.INPUTS):
        leftover.unlink(missing_ok=True)
    manifest = _finish(job, folder, max_bad_fraction)
    (folder / shard_job.JOB).unlink()
    return manifest


@contextlib.contextmanager
def _progress(job: Job, output: str) -> Iterator[None]:
    """Shows how many shards are complete; workers have no other way to tell."""
    stop = threading.Event()
    names = {f"{name}.json" for name in job.shard_names()}

    def watch():
        with tqdm.tqdm(total=len(names), desc="preparing", unit=" shards") as bar:
            while not stop.wait(5.0):
                bar.update(_count() - bar.n)
            bar.update(_count() - bar.n)

    def _count() -> int:
        return sum(path.name in names for path in epath.Path(output).iterdir())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@functools.lru_cache(maxsize=1)
def _read_job(output: str, key: str) -> tuple[Job, VideoList]:
    """Reads what to do, once per process."""
    folder = epath.Path(output)
    job = Job.from_json(json.loads((folder / shard_job.JOB).read_text()))
    if job.key != key:
        raise RuntimeError(f"another job has begun in {output}")
    with np.load(io.BytesIO((folder / shard_job.INPUTS).read_bytes())) as arrays:
        root = os.fsdecode(arrays["root"].item())
        return job, VideoList.from_arrays(job.source, root, arrays)


def encode_shard(output: str, key: str, shard: int) -> None:
    """Writes one shard unless it is there: what a Beam worker does.

    Args:
      output: folder with the job's description.
      key: `Job.key`.
      shard: number of the shard.
    """
    job, source = _read_job(output, key)
    folder, name = epath.Path(output), shards.shard_name(shard, job.num_shards)
    path = folder / f"{name}{shards.SUFFIX}"
    note = shard_job.read_note(folder, name, key)
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

    with _written_whole(path) as temporary:
        shards.write_shard(temporary, encoded())
        note = {
            "job": key,
            "num_bytes": os.path.getsize(temporary),
            "sha256": shards.checksum(temporary),
            "records": records,
            "failures": failures,
        }
    shards.write_whole(folder / f"{name}.json", json.dumps(note).encode())


@contextlib.contextmanager
def _written_whole(path: epath.Path) -> Iterator[str]:
    """Gives a local name to write to; the file then appears at `path`, all at once."""
    part = path.parent / f".{path.name}-{uuid.uuid4().hex}.part"
    if not is_remote(str(path)):
        try:
            yield str(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        return
    with tempfile.TemporaryDirectory() as scratch:  # ArrayRecord writes local files
        local = os.path.join(scratch, path.name)
        yield local
        with open(local, "rb") as source, part.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 22)
        part.replace(path)


def _finish(job: Job, folder: epath.Path, max_bad_fraction: float) -> dict:
    """Writes failures, index and, last, the manifest."""
    names, notes = job.shard_names(), shard_job.read_notes(folder, job)
    missing = [name for name, note in zip(names, notes, strict=True) if note is None]
    if missing:
        raise RuntimeError(f"the pipeline ended without the shard {missing[0]}")
    failures = [failure for note in notes for failure in note["failures"]]
    lines = "".join(json.dumps(failure) + "\n" for failure in failures)
    shards.write_whole(folder / shards.FAILURES, lines.encode())
    listed = f"{len(failures)} of {job.num_inputs} videos failed, listed in " + repr(
        str(folder / shards.FAILURES)
    )
    if len(failures) == job.num_inputs:
        raise UserError(
            f"{listed}: not one could be prepared; mend them and run again with "
            "--retry_failures"
        )
    if len(failures) > max_bad_fraction * job.num_inputs:
        raise UserError(
            f"{listed}, more than --max_bad_fraction={max_bad_fraction:g} allows: "
            "allow more, or mend them and add --retry_failures, and run again, which "
            "keeps what is done"
        )
    records = (record for note in notes for record in note["records"])
    manifest = {
        **job.to_json(),
        "num_records": job.num_inputs - len(failures),
        "num_failures": len(failures),
        "index": shards.write_index(str(folder), records),
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
    shards.write_whole(folder / shards.MANIFEST, content)
    return manifest
