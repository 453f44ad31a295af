"""Tokens of videos on disk, so that heads can be trained without the encoder.

    <folder>/<key>/tokens.arrayrecord   a record per video: its tokens, all views
    <folder>/<key>/index.npz            the record of each video, shape of the tokens

The key is a digest of everything that the tokens depend on. Files are written into a
folder with a temporary name that is renamed when it is complete, so that what an
interrupted program left is never read.
"""

import contextlib
import dataclasses
import hashlib
import pathlib
import shutil
from typing import Any

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
from vjepa_jax.evals.tokens.clip_tokens import TokenBatch, TokenBatches, Videos

_FORMAT = "vjepa_jax tokens 1"
# Rows are read in random order: reading ahead would be useless.
_READER_OPTIONS = "readahead_buffer_size:0"
_RECORDS, _INDEX = "tokens.arrayrecord", "index.npz"


def weights_digest(model: FrozenModel, with_predictor: bool = False) -> str:
    """Return a digest of a model's target encoder: its fields and its weights.

    Args:
      model: to identify.
      with_predictor: whether to include its predictor.
    """
    digest = hashlib.sha256()
    parts: list[tuple[Any, str]] = [(model.encoder, "target")]
    if with_predictor:
        parts.append((model.predictor, "predictor"))
    for module, name in parts:
        digest.update(repr(module).encode())
        for path, leaf in jax.tree_util.tree_leaves_with_path(model.params[name]):
            digest.update(jax.tree_util.keystr(path).encode())
            digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class CachedVideos:
    """Tokens of videos on disk, with the same batches as `clip_tokens.Videos`.

    Attributes:
      folder: holds both files.
      row: int64 [videos], the record of each video; -1: the video is unreadable.
      labels: int64 [videos].
      shape: of the tokens of a video, (views, N, D).
      dtype: of the stored tokens.
    """

    folder: pathlib.Path
    row: np.ndarray
    labels: np.ndarray
    shape: tuple[int, int, int]
    dtype: jnp.dtype

    def __len__(self) -> int:
        """Return the number of videos."""
        return len(self.row)

    def _open(self) -> ArrayRecordReader:
        reader = ArrayRecordReader(str(self.folder / _RECORDS), _READER_OPTIONS)
        # A reader of an incomplete file finds no records, and reads nothing of them.
        expected = int((self.row >= 0).sum())
        if reader.num_records() != expected:
            found = f"{reader.num_records()} records instead of {expected}"
            raise self._damaged(found)
        return reader

    def _damaged(self, reason: object) -> UserError:
        path = self.folder / _RECORDS
        return UserError(f"{path} is damaged ({reason}): {_fix(self.folder)}")

    def batches(self, batch_size: int, order: np.ndarray | None = None) -> TokenBatches:
        """Yield batches of one size, see `clip_tokens.Videos.batches`.

        Raises:
          UserError: the records are damaged.
        """
        order = np.arange(len(self)) if order is None else np.asarray(order)
        with contextlib.closing(self._open()) as reader:
            for start in range(0, len(order), batch_size):
                index = order[start : start + batch_size]
                missing = batch_size - len(index)
                index = np.pad(index, (0, missing), constant_values=-1)
                row = np.where(index < 0, -1, self.row[index])
                valid = row >= 0
                tokens = np.zeros((batch_size, *self.shape), np.float32)
                try:
                    records = reader.read(row[valid].tolist()) if valid.any() else ()
                    for i, record in zip(np.flatnonzero(valid), records, strict=True):
                        array = np.frombuffer(record, self.dtype)
                        tokens[i] = array.reshape(self.shape)
                except (RuntimeError, ValueError, IndexError) as error:
                    raise self._damaged(error) from None
                labels = np.where(valid, self.labels[index], 0)
                yield TokenBatch(tokens, labels, index, valid)


def cached(
    videos: Videos, folder: str, dtype: str, batch_size: int, model_digest: str
) -> CachedVideos:
    """Return the tokens of videos from a cache, which is written if it is missing.

    Args:
      videos: to encode.
      folder: of the caches of all models and data sets; local.
      dtype: of the stored tokens, `float32` or `bfloat16`.
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
        videos.source.path_of(0),  # a copied list may name other files
        repr(videos.reader),
        repr((*videos.encoder.cache_key(), videos.num_views, dtype)),
    )
    key = digest_of(part.encode() for part in parts)[:32]
    cache = pathlib.Path(folder) / key
    if not cache.exists():
        cache.parent.mkdir(parents=True, exist_ok=True)
        try:
            with files.renamed_when_complete(cache) as part:
                part.mkdir()
                _write(videos, pathlib.Path(part), dtype, batch_size)
        except OSError:  # another program may have written it first
            if not cache.exists():
                raise
    logging.info("tokens of %s are in %s", videos.source.name, cache)
    index = files.read_arrays(cache / _INDEX, _fix(cache))
    return CachedVideos(
        cache,
        index["row"],
        np.asarray(videos.source.labels),
        tuple(index["shape"].tolist()),
        jnp.dtype(dtype),
    )


def _fix(cache: pathlib.Path) -> str:
    return f"remove {cache}, and it is written again"


def _write(videos: Videos, folder: pathlib.Path, dtype: str, batch_size: int) -> None:
    row, shape = np.full(len(videos), -1, np.int64), None
    writer = ArrayRecordWriter(str(folder / _RECORDS), "group_size:1,uncompressed")
    try:
        for batch in videos.batches(batch_size):
            if shape is None:
                shape = batch.tokens.shape[1:]
                _require_space(videos, folder, shape, dtype)
            # Batches are in the order of the source, and so are records.
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
