"""Lists and folders in a remote store, a stand-in of which lies in memory."""

import fsspec
import pytest
from buckets import Bucket
from etils.epath import backend
from list_files import records, write_list

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources.open import open_source


def test_remote_lists(bucket, tmp_path):
    bucket(
        {
            "gs://b/lists/train.csv": b"a.mp4 1\ngs://c/x.mp4 2\n/local.mp4 3\n",
            "gs://b/lists/a.mp4": b"video",
        }
    )
    source = open_source("gs://b/lists/train.csv")
    assert records(source) == [
        ("gs://b/lists/a.mp4", 1),
        ("gs://c/x.mp4", 2),
        ("/local.mp4", 3),
    ]
    assert open_source("gs://b/lists/train.csv").class_names is None
    bucket({"gs://b/lists/classes.txt": b"put\ntake\nopen\nclose\n"})
    assert open_source("gs://b/lists/train.csv").class_names[3] == "close"
    here = write_list(tmp_path, "gs://b/lists/a.mp4 7\n")
    assert records(open_source(here)) == [("gs://b/lists/a.mp4", 7)]


def test_remote_folders(bucket):
    bucket(
        {
            "gs://b/data/cat/1.mp4": b"v",
            "gs://b/data/cat/deep/2.jpg": b"v",
            "gs://b/data/dog/3.mp4": b"v",
            "gs://b/data/.trash/4.mp4": b"v",
            "gs://b/data/dog/notes.txt": b"v",
        }
    )
    for path in ("gs://b/data", "gs://b/data/"):
        assert records(open_source(path)) == [
            ("gs://b/data/cat/1.mp4", 0),
            ("gs://b/data/cat/deep/2.jpg", 0),
            ("gs://b/data/dog/3.mp4", 1),
        ]
        assert open_source(path).class_names == ["cat", "dog"]


def test_remote_errors_are_one_line(bucket, monkeypatch):
    bucket({"gs://b/train.csv": b"a.mp4 1\n"})
    with pytest.raises(UserError, match="does not exist"):
        open_source("gs://b/nothing")
    with pytest.raises(UserError, match="none of the 1 files looked for"):
        open_source("gs://b/train.csv")

    def refuse(*args, **kwargs):
        raise RuntimeError("no\ncredentials")

    monkeypatch.setattr(Bucket, "exists", refuse)
    with pytest.raises(UserError, match="cannot be read: no credentials"):
        open_source("gs://b/train.csv")
    backend.fsspec_backend._get_filesystem.cache_clear()

    def missing(*args, **kwargs):
        raise ImportError("Install gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    with pytest.raises(UserError, match=r"pip install 'vjepa_jax\[gcs\]'"):
        open_source("gs://b/train.csv")
