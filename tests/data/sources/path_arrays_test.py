"""Arrays of paths: valid, damaged, and of Python objects."""

import io
import random

import numpy as np
import pytest
from list_files import make_files, records

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources.file_lists import VideoList
from vjepa_jax.data.sources.open import open_source


@pytest.mark.parametrize("dtype", [str, "<U40", ">U40"])
def test_arrays_of_paths(tmp_path, dtype):
    make_files(tmp_path, "b.mp4")
    names = ["a \\ 'quoted' é 日本.mp4", "b.mp4", "/elsewhere/c.mp4"]
    np.save(tmp_path / "list.npy", np.array(names, dtype))
    source = open_source(str(tmp_path / "list.npy"))
    assert records(source) == [(str(tmp_path / name), 0) for name in names]


def npy_bytes(array):
    content = io.BytesIO()
    np.save(content, np.array(array))
    return content.getvalue()


def test_damaged_arrays_of_paths_are_a_users_error(tmp_path):
    whole = npy_bytes([f"folder {i % 3}/vidéo_{i}.mp4" for i in range(30)])
    path = tmp_path / "list.npy"
    num_refused = 0
    for _ in range(500):
        content = bytearray(whole)
        content[random.randrange(len(whole))] ^= random.randrange(1, 256)
        path.write_bytes(content)
        try:
            source = VideoList.from_array_file(str(path))
        except UserError as error:
            assert str(error).startswith(f"{path} is not a .npy array of paths: ")
            assert "\n" not in str(error) and len(str(error)) < 200 + len(str(path))
            num_refused += 1
        else:
            assert all("\0" not in record.path for record in source)
    assert num_refused


@pytest.mark.parametrize(
    "array, message",
    [
        (np.arange(3), "one-dimensional array of strings"),
        (np.array([["a", "b"]]), "one-dimensional array of strings"),
        (np.array(["a", "b"], object), r"pickled objects; save it again with np\.save"),
        (np.array(["a", ""]), "entry 1 cannot be a path: ''"),
        (np.array(["a\0b"]), "entry 0 cannot be a path"),
        (np.array(["\ud800"]), "surrogates not allowed"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "list.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        open_source(str(tmp_path / "list.npy"))


def test_files_that_are_no_arrays_are_refused(tmp_path):
    whole = npy_bytes(["a", "b"])
    for content in (b"", b"text 1", whole[:-4], whole[:60]):
        (tmp_path / "list.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"list\.npy is not a \.npy array of paths"):
            open_source(str(tmp_path / "list.npy"))
