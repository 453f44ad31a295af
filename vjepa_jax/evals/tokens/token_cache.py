"""Tokens of videos on disk, so that heads can be trained without the encoder.

    <folder>/<key>/tokens.arrayrecord   a record per video: its tokens, all views
    <folder>/<key>/index.npz            which record is a video's, shape of the tokens

The key is a digest of all that the tokens depend on. Files are written under a
temporary name, `.<key>-*.part`, and the folder is renamed when it is whole: what an
interrupted program leaves behind is never read.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
import shutil
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from array_record.python.array_record_module import (
    ArrayRecordReader,
    ArrayRecordWriter,
)

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources.records import digest_of
from vjepa_jax.evals.frozen import FrozenModel
from vjepa_jax.evals.tokens.clip_tokens import TokenBatch, Videos

_FORMAT = "vjepa_jax tokens 1"
# Rows are read in any order: a reader that looks ahead would read in vain.
_READER_OPTIONS = "readahead_buffer_size:0"
_RECORDS, _INDEX = "tokens.arrayrecord", "index.npz"


def weights_digest(frozen: FrozenModel, with_predictor: bool = False) -> str:
    """Identify a frozen model's target encoder: its fields and its weights.

    Args:
      frozen: the model.
      with_predictor: whether tokens depend on its predictor as well.
    """
    digest = hashlib.sha256()
    parts = [(frozen.encoder, "target")]
    if with_predictor:
        parts.append((frozen.predictor, "predictor"))
    for module, name in parts:
        digest.update(repr(module).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(frozen.params[name]):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class CachedVideos:
    """Videos' tokens on disk; batches are those of `clip_tokens.Videos`.

    Attributes:
      folder: with both files.
      row: int64 [videos], the record of each video; -1: it is unreadable.
      labels: int64 [videos].
      shape: of a video's tokens, (views, N, D).
      dtype: as they are stored.
    """

    folder: pathlib.Path
    row: np.ndarray
    labels: np.ndarray
    shape: tuple[int, int, int]
    dtype: jnp.dtype

    def __len__(self) -> int:
        """Return the number of videos."""
        return len(self.row)

    def batches(
        self, batch_size: int, order: np.ndarray | None = None
    ) -> Iterator[TokenBatch]:
        """Yield batches of one size, see `clip_tokens.Videos.batches`."""
        order = np.arange(len(self)) if order is None else np.asarray(order)
        records = str(self.folder / _RECORDS)
        with contextlib.closing(ArrayRecordReader(records, _READER_OPTIONS)) as reader:
            for start in range(0, len(order), batch_size):
                index = order[start : start + batch_size]
                missing = batch_size - len(index)
                index = np.pad(index, (0, missing), constant_values=-1)
                row = np.where(index < 0, -1, self.row[index])
                valid = row >= 0
                tokens = np.zeros((batch_size, *self.shape), np.float32)
                found = reader.read(row[valid].tolist()) if valid.any() else ()
                for place, record in zip(np.flatnonzero(valid), found, strict=True):
                    stored = np.frombuffer(record, self.dtype)
                    tokens[place] = stored.reshape(self.shape)
                labels = np.where(valid, self.labels[index], 0)
                yield TokenBatch(tokens, labels, index, valid)


def cached(
    videos: Videos, folder: str, dtype: str, batch_size: int, model_digest: str
) -> CachedVideos:
    """Return videos' tokens from a folder, encoding and writing them if need be.

    Args:
      videos: to encode.
      folder: of caches, of all models and data sets; local.
      dtype: to store, `float32` or `bfloat16`.
      batch_size: videos to encode at once.
      model_digest: from `weights_digest`.

    Raises:
      UserError: the disk is too small, or the folder is not local.
    """
    if files.is_remote(folder):
        raise UserError(
            f"config.cache.path={folder!r} must be a local folder; leave it empty to "
            "encode in every epoch"
        )
    if jax.process_count() > 1:
        raise UserError(
            "tokens are cached by one process: leave config.cache.path empty"
        )
    parts = (
        _FORMAT,
        model_digest,
        videos.source.digest(),
        videos.source.path_of(0),  # copies of a list may be of other pixels
        repr(videos.reader),
        repr((*videos.encoder.settings(), videos.num_views, dtype)),
    )
    key = digest_of(part.encode() for part in parts)[:32]
    place = pathlib.Path(folder) / key
    if not place.exists():
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with files.renamed_when_complete(place) as part:
                part.mkdir()
                _write(videos, pathlib.Path(part), dtype, batch_size)
        except OSError:  # another program may have been faster
            if not place.exists():
                raise
    logging.info("tokens of %s are in %s", videos.source.name, place)
    with np.load(place / _INDEX) as index:
        return CachedVideos(
            place,
            index["row"],
            np.asarray(videos.source.labels),
            tuple(index["shape"].tolist()),
            jnp.dtype(dtype),
        )


def _write(videos: Videos, folder: pathlib.Path, dtype: str, batch_size: int) -> None:
    row, shape = np.full(len(videos), -1, np.int64), None
    writer = ArrayRecordWriter(str(folder / _RECORDS), "group_size:1,uncompressed")
    try:
        for batch in videos.batches(batch_size):
            if shape is None:
                shape = batch.tokens.shape[1:]
                _require_space(videos, folder, shape, dtype)
            # In the order of the list, hence rows follow from counting.
            index = batch.index[batch.valid]
            row[index] = row.max() + 1 + np.arange(len(index))
            for tokens in batch.tokens[batch.valid].astype(jnp.dtype(dtype)):
                writer.write(tokens.tobytes())
    finally:
        writer.close()
    np.savez(folder / _INDEX, row=row, shape=np.array(shape))


def _require_space(
    videos: Videos, folder: pathlib.Path, shape: tuple[int, ...], dtype: str
) -> None:
    needed = len(videos) * int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the tokens of {len(videos)} videos take {needed / 1e9:.1f} GB and "
            f"{str(folder.parent)!r} has {free / 1e9:.1f} GB free: leave "
            "config.cache.path empty to encode in every epoch"
        )
