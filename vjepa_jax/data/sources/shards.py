"""Prepared videos: ArrayRecord shards in a folder, with a manifest and an index.

    manifest.json                          written last: settings, counts, checksums
    index.npz                              labels, ids and frame counts of all records
    failures.jsonl                         videos that could not be prepared, and why
    shard-00000-of-00064.arrayrecord       the records, one video each
    shard-00000-of-00064.json              counts and checksum of the shard

A record is a MessagePack map with the keys `video` (an encoded file, MP4 with H.264),
`label`, `id` (the path as listed), `path` (of the original), `fps`, `num_frames`,
`width` and `height`, which any language can read. ArrayRecord keeps a checksum of every
record; the manifest holds the checksums of whole files.
"""

import collections
import dataclasses
import hashlib
import io
import json
import os
import threading
from collections.abc import Callable, Iterable

import msgpack
import numpy as np
from absl import logging
from array_record.python.array_record_module import (
    ArrayRecordReader,
    ArrayRecordWriter,
)
from etils import epath

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources.records import Record, Source, digest_of

_FORMAT_NAME = "vjepa_jax video shards"
FORMAT = f"{_FORMAT_NAME} 1"
MANIFEST = "manifest.json"
INDEX = "index.npz"
FAILURES = "failures.jsonl"
CLASS_NAMES = "class_names"  # in the manifest, in the order of labels, if there are any
SUFFIX = ".arrayrecord"

# H.264 cannot be compressed further, and records are read one by one.
_WRITER_OPTIONS = "group_size:1,uncompressed"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"

# Each needs a file descriptor, and processes commonly have 1024; opening takes 0.1 ms.
_MAX_OPEN_SHARDS = 128


@dataclasses.dataclass(frozen=True)
class VideoRecord:
    """One video in a shard.

    Attributes:
      video: an encoded file, MP4 with H.264.
      label: class of the video; 0 where there are no classes.
      id: the path as listed, which does not depend on where the dataset lies.
      path: of the original.
      fps: mean frame rate in frames per second.
      num_frames: frames in `video`.
      width: in pixels.
      height: in pixels.
    """

    video: bytes
    label: int
    id: str
    path: str
    fps: float
    num_frames: int
    width: int
    height: int

    def pack(self) -> bytes:
        """Return the record as a MessagePack map."""
        return msgpack.packb(dataclasses.asdict(self), unicode_errors="surrogateescape")

    @classmethod
    def unpack(cls, content: bytes) -> "VideoRecord":
        """Read the bytes of `pack`; keys that a later version adds are ignored."""
        fields = msgpack.unpackb(content, unicode_errors="surrogateescape")
        return cls(**{f.name: fields[f.name] for f in dataclasses.fields(cls)})


def shard_name(index: int, count: int) -> str:
    """Return the name of a shard without its suffix."""
    return f"shard-{index:05d}-of-{count:05d}"


def write_shard(path: str, records: Iterable[VideoRecord]) -> None:
    """Write an ArrayRecord file with the local name `path`."""
    writer = ArrayRecordWriter(path, _WRITER_OPTIONS)
    try:
        for record in records:
            writer.write(record.pack())
    finally:
        writer.close()


def checksum(path: str) -> str:
    """Return the SHA-256 of a local or remote file, in hexadecimal."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_index(
    folder: str, records: Iterable[tuple[str, int, int]]
) -> dict[str, object]:
    """Write the index of `(id, label, num_frames)` of all records.

    Returns:
      Entry of the index in the manifest: checksum of the file, digest of the content.
    """
    ids, labels, num_frames = [], [], []
    for name, label, frames in records:
        ids.append(name.encode(errors="surrogateescape"))
        labels.append(label)
        num_frames.append(frames)
    arrays = {
        "label": np.array(labels, "<i8"),
        "num_frames": np.array(num_frames, "<i4"),
        "id_bytes": np.frombuffer(b"".join(ids), np.uint8),
        "id_end": np.cumsum([len(name) for name in ids], dtype="<i8"),
    }
    content = io.BytesIO()
    # mypy takes `**` for `allow_pickle` as well.
    np.savez(content, **arrays)  # type: ignore[arg-type]
    files.write_whole(epath.Path(folder) / INDEX, content.getvalue())
    return {
        "sha256": hashlib.sha256(content.getvalue()).hexdigest(),
        "digest": digest_of(array.tobytes() for array in arrays.values()),
    }


def is_shard_folder(path: str) -> bool:
    """Whether a folder holds shards, complete or not."""
    folder = epath.Path(path)
    if (folder / f"{MANIFEST}.part").exists():
        return True
    try:
        if _parse(folder / MANIFEST)["format"].startswith(_FORMAT_NAME):
            return True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # no manifest, a damaged one, or one of another program
    return any(folder.glob(f"shard-*{SUFFIX}"))


def read_manifest(path: str) -> dict:
    """Read the manifest of a folder of shards.

    Raises:
      UserError: it is missing, damaged, or of another version.
    """
    if not epath.Path(path).exists():
        raise UserError(f"{path!r} does not exist")
    manifest = epath.Path(path) / MANIFEST
    if not manifest.exists():
        raise UserError(
            f"the shards in {path!r} are not complete: {MANIFEST} is missing; run "
            f"vjepa_jax.prepare --output={path} again to finish them"
        )
    try:
        content = _parse(manifest)
        found = content.get("format")
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{str(manifest)!r} is damaged ({error}): run vjepa_jax.prepare again"
        ) from error
    if found != FORMAT:
        raise UserError(
            f"{str(manifest)!r} has the format {found!r}; this version "
            f"reads {FORMAT!r}: prepare the videos again"
        )
    return content


def _parse(path: epath.Path) -> dict:
    return json.loads(path.read_text())


class ShardSource(Source):
    """The records of a folder of shards.

    Only manifest and index are read at first; each process opens the shards when it
    reads from them.

    Attributes:
      name: the folder.
      labels: int64 [len(self)].
      num_frames: int32 [len(self)], frames of each video.
    """

    def __init__(self, path: str):
        """Open a folder and compare its files with the manifest.

        Raises:
          UserError: a shard or the index is missing or differs from the manifest.
        """
        if files.is_remote(path):
            raise UserError(
                f"data.path {path!r}: ArrayRecord reads mounted folders only; mount "
                "the bucket (gcsfuse) and give the folder's local path"
            )
        self.name = path = files.absolute(path)
        manifest = read_manifest(path)
        self._settings = manifest["settings"]
        self._digest = manifest["index"]["digest"]
        self._may_have_names = CLASS_NAMES in manifest
        self._class_names: list[str] | None = manifest.get(CLASS_NAMES)
        self._names = [shard["name"] + SUFFIX for shard in manifest["shards"]]
        counts = [shard["num_records"] for shard in manifest["shards"]]
        self._ends = np.cumsum(counts, dtype=np.int64)
        for shard, name in zip(manifest["shards"], self._names, strict=True):
            _check_size(os.path.join(path, name), shard["num_bytes"])
        index = _read_index(path, manifest["index"]["sha256"])
        self.labels: np.ndarray = index["label"].astype(np.int64)
        self.num_frames = index["num_frames"].astype(np.int32)
        if len(self.labels) != sum(counts):
            raise UserError(
                f"the index of {path!r} has {len(self.labels)} records, the shards "
                f"{sum(counts)}: run vjepa_jax.prepare --output={path} again"
            )
        self._open_no_shard()

    @property
    def class_names(self) -> list[str] | None:
        """Names of the classes in the order of their labels; None: numbers only."""
        if not self._may_have_names:
            logging.warning(
                "the shards in %r were prepared without the names of their classes, so "
                "that they cannot be compared with others: if they are of class "
                "folders, the same command of vjepa_jax.prepare adds them",
                self.name,
            )
        return self._class_names

    def _open_no_shard(self) -> None:
        self._readers: collections.OrderedDict[str, ArrayRecordReader]
        self._readers = collections.OrderedDict()
        self._lock = threading.Lock()
        self._pid = os.getpid()

    def __getstate__(self) -> dict:
        """Leave out what belongs to this process."""
        own = ("_readers", "_lock", "_pid")
        return {k: v for k, v in self.__dict__.items() if k not in own}

    def __setstate__(self, state: dict) -> None:
        """Restore the result of `__getstate__`."""
        self.__dict__.update(state)
        self._open_no_shard()

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.labels)

    def __getitem__(self, index: int) -> Record:
        """Read the record at `index`, which may count from the end.

        Raises:
          OSError: the shard is damaged or gone; names it.
        """
        index = range(len(self))[index]
        video = self.read(index)
        return Record(self.path_of(index), video.label, video.video)

    def read(self, index: int) -> VideoRecord:
        """Read all fields of the record at `index`; see `__getitem__`."""
        name, position = self._locate(index)
        try:
            (content,) = self._reader(name).read([position])
            return VideoRecord.unpack(content)
        except (RuntimeError, IndexError, ValueError, KeyError, TypeError) as error:
            with self._lock:  # the next attempt opens the file anew
                self._readers.pop(name, None)
            raise OSError(f"{self.path_of(index)}: {error}") from error

    def path_of(self, index: int) -> str:
        """Return `SHARD#POSITION`, without reading."""
        name, position = self._locate(range(len(self))[index])
        return f"{os.path.join(self.name, name)}#{position}"

    def digest(self) -> str:
        """Return a hash of ids, labels, frame counts and the encoding settings."""
        settings = json.dumps(self._settings, sort_keys=True)
        return digest_of((self._digest.encode(), settings.encode()))

    def _locate(self, index: int) -> tuple[str, int]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        start = int(self._ends[shard - 1]) if shard else 0
        return self._names[shard], index - start

    def _reader(self, name: str) -> ArrayRecordReader:
        with self._lock:
            if self._pid != os.getpid():  # forked: file offsets would be shared
                self._readers.clear()
                self._pid = os.getpid()
            reader = self._readers.pop(name, None) or ArrayRecordReader(
                os.path.join(self.name, name),
                options=_READER_OPTIONS,
                file_reader_buffer_size=32768,
            )
            self._readers[name] = reader
            if len(self._readers) > _MAX_OPEN_SHARDS:
                self._readers.popitem(last=False)
            return reader


def _check_size(path: str, num_bytes: int) -> None:
    fix = "restore it, or remove it and its .json and run vjepa_jax.prepare again"
    try:
        found = os.path.getsize(path)
    except OSError:
        raise UserError(f"shard {path!r} is missing: {fix}") from None
    if found != num_bytes:
        raise UserError(
            f"shard {path!r} has {found} bytes, but {num_bytes} by the manifest: {fix}"
        )


def _read_index(path: str, sha256: str) -> dict[str, np.ndarray]:
    try:
        content = (epath.Path(path) / INDEX).read_bytes()
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise UserError(
            f"{os.path.join(path, INDEX)!r} is missing or damaged: run "
            f"vjepa_jax.prepare --output={path} again to write it"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return dict(arrays)


def verify(path: str, progress: Callable[[list], Iterable] = iter) -> int:
    """Compare every byte of the shards with the manifest's checksums.

    Args:
      path: a folder of shards.
      progress: wraps the list of shards, such as `tqdm.tqdm`.

    Returns:
      The number of records.

    Raises:
      UserError: a shard is damaged.
    """
    source = ShardSource(path)
    for shard in progress(read_manifest(path)["shards"]):
        shard_path = os.path.join(source.name, shard["name"] + SUFFIX)
        if checksum(shard_path) != shard["sha256"]:
            raise UserError(
                f"shard {shard_path!r} is damaged, its checksum is not that of the "
                "manifest: remove it and its .json and run vjepa_jax.prepare again"
            )
    return len(source)
