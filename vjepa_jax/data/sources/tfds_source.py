"""Videos and images of a prepared TFDS dataset, read without TensorFlow.

The dataset must be prepared as ArrayRecord files (`file_format="array_record"`); it is
neither downloaded nor prepared here. Features of the type `Video` cannot be opened
without TensorFlow. Datasets store frames as `Sequence(Image)` instead, or files as
`Text` or as scalars of the type object.
"""

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources.records import Record, Source, digest_of

PREFIX = "tfds:"

# A version such as `:1.2.0` belongs to the name; no split begins with a digit.
_SPEC = re.compile(
    r"tfds:(?P<name>[^:@]+(?::\d[\w.*]*)?):(?P<split>[A-Za-z][^@]*)(?:@(?P<folder>.+))?"
)

# Texts and byte strings can hold anything: only these names are read as videos.
_ENCODED_NAMES = ("video", "clip", "media", "mp4", "video_bytes")
_MEDIA_NAMES = ("video", "image")  # preferred among several, in this order


def open_tfds(path: str) -> "TfdsSource":
    """Open `tfds:NAME:SPLIT` or `tfds:NAME:SPLIT@DIR`.

    Args:
      path: `NAME` as in TFDS, with config and version; `SPLIT` such as `train` or
        `train[:90%]`; `DIR` instead of `~/tensorflow_datasets`, local or remote.

    Raises:
      UserError: the dataset or its media cannot be found.
    """
    parsed = _SPEC.fullmatch(path)
    if parsed is None:
        raise UserError(
            f"data.path {path!r} should be tfds:NAME:SPLIT or tfds:NAME:SPLIT@DIR, "
            "such as tfds:my_videos:train@/data/tfds"
        )
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"data.path {path!r} needs TFDS ({error}): pip install 'vjepa_jax[tfds]'"
        ) from error
    try:
        data = tfds.data_source(
            parsed["name"],
            split=parsed["split"],
            data_dir=parsed["folder"],
            download=False,
            deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES,
        )
    except ModuleNotFoundError as error:
        raise UserError(
            f"data.path {path!r} cannot be opened without the module {error.name!r}: "
            "of the features, Video needs tensorflow; store frames as Sequence(Image)"
        ) from error
    except (ValueError, AssertionError, NotImplementedError, OSError) as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(
            f"data.path {path!r} cannot be opened: {reason}; the dataset must lie "
            "prepared as array_record files in ~/tensorflow_datasets or in @DIR"
        ) from error
    if not len(data):
        raise UserError(f"data.path {path!r} has no records")
    return TfdsSource(path, data)


class TfdsSource(Source):
    """The records of one split.

    The video is the only feature of type `Image` or `Sequence(Image)`, or a `Text` or
    scalar of bytes that holds a file and is named video, clip, media, mp4 or
    video_bytes. Of several, it is the one named video, else image. The label is the
    feature named label or the only `ClassLabel`, and the frame rate is the number named
    fps; both may be missing.

    Attributes:
      name: `tfds:NAME:SPLIT[@DIR]`.
    """

    def __init__(self, name: str, data: Any):
        """Wrap a data source of TFDS that gives bytes as stored."""
        import tensorflow_datasets as tfds

        self.name = name
        self._data = data
        features = dict(data.dataset_info.features.items())
        self._media, self._kind = _choose_media(name, features)
        self._label = _choose_label(name, features)
        if not self._label:
            self.unlabelled = "it has no feature named label and no ClassLabel"
        rate = features.get("fps")
        self._fps = "fps" if isinstance(rate, tfds.features.Scalar) else None
        wanted = {self._media, self._label, self._fps} - {None}
        # The other features are not decoded.
        self._features = tfds.features.FeaturesDict({k: features[k] for k in wanted})
        # Encoded images are cropped while they are decoded, which is cheaper.
        self._decoders = (
            {self._media: tfds.decode.SkipDecoding()} if self._kind == "image" else None
        )

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._data)

    def __getitem__(self, index: int) -> Record:
        """Read the record at `index`, which may count from the end.

        Raises:
          OSError: the files are damaged or gone.
        """
        index = range(len(self))[index]
        try:
            example = self._features.deserialize_example_np(
                self._data[index], decoders=self._decoders
            )
        # Riegeli, protocol buffers and decoders raise these for damaged files.
        except (RuntimeError, ValueError, LookupError, TypeError) as error:
            raise OSError(f"{self.path_of(index)}: {error}") from error
        media = example[self._media]
        if self._kind == "frames":
            media = np.asarray(media)
            if media.shape[-1] == 1:
                media = np.repeat(media, 3, axis=-1)
        return Record(
            path=self.path_of(index),
            label=int(example[self._label]) if self._label else 0,
            media=media,
            fps=float(example[self._fps]) if self._fps else None,
        )

    def path_of(self, index: int) -> str:
        """Return `tfds:NAME:SPLIT[@DIR]#INDEX`."""
        return f"{self.name}#{range(len(self))[index]}"

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """Labels of all records, int64 [len(self)].

        TFDS has no index of labels: the first use reads the whole split, but decodes
        only the labels.
        """
        import tensorflow_datasets as tfds

        if not self._label:
            return np.zeros(len(self), np.int64)
        only = tfds.features.FeaturesDict({self._label: self._features[self._label]})
        return np.array(
            [
                only.deserialize_example_np(self._data[i])[self._label]
                for i in range(len(self))
            ],
            np.int64,
        )

    @property
    def class_names(self) -> list[str] | None:
        """Names of a `ClassLabel` in the order of labels; None: numbers only."""
        feature = self._features[self._label] if self._label else None
        return getattr(feature, "names", None)

    def digest(self) -> str:
        """Return a hash of dataset, version, split and the features in use."""
        info = self._data.dataset_info
        splits = {
            name: (split.num_examples, split.num_bytes, list(split.shard_lengths))
            for name, split in info.splits.items()
        }
        used = [self._media, self._label, self._fps]
        parts = [info.full_name, str(self._data.split), splits, used]
        return digest_of([json.dumps(parts, sort_keys=True).encode()])


def _choose_media(name: str, features: Mapping[str, Any]) -> tuple[str, str]:
    """Return the feature's name and whether it holds frames, an image or a file."""
    kinds = {
        key: kind
        for key, feature in features.items()
        if (kind := _kind_of(key, feature))
    }
    found = list(kinds)
    for key in _MEDIA_NAMES:
        if len(found) > 1 and key in found:
            found = [key]
    if len(found) == 1:
        return found[0], kinds[found[0]]
    listed = ", ".join(f"{key}: {type(features[key]).__name__}" for key in features)
    problem = "more than one feature" if found else "no feature"
    raise UserError(
        f"{name!r} has {problem} to take videos or images from: {{{listed}}}; one of "
        "the type Image or Sequence(Image), or a Text or bytes named video, is needed"
    )


def _kind_of(key: str, feature: Any) -> str | None:
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image):
        return "image"
    if isinstance(feature, tfds.features.Sequence):
        return "frames" if isinstance(feature.feature, tfds.features.Image) else None
    is_bytes = feature.shape == () and feature.np_dtype in (np.object_, np.str_)
    return "file" if is_bytes and key in _ENCODED_NAMES else None


def _choose_label(name: str, features: Mapping[str, Any]) -> str | None:
    import tensorflow_datasets as tfds

    label = features.get("label")
    if (
        label is not None
        and label.shape == ()
        and np.issubdtype(label.np_dtype, np.integer)
    ):
        return "label"
    classes = [
        key
        for key, feature in features.items()
        if isinstance(feature, tfds.features.ClassLabel)
    ]
    if len(classes) > 1:
        raise UserError(
            f"{name!r} has several labels, none of them named label: "
            + ", ".join(classes)
        )
    return classes[0] if classes else None
