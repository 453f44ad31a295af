"""Arrays of paths, sound, damaged and hostile."""

import io
import os
import pickle
import random
import tracemalloc

import numpy as np
import pytest
from list_files import make_files, records

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources import factory


@pytest.mark.parametrize("dtype", [object, str, ">U40"])
def test_arrays_of_paths(tmp_path, dtype):
    make_files(tmp_path, "b.mp4")
    names = ["a \\ 'quoted' é.mp4", "b.mp4", "/elsewhere/c.mp4"]
    np.save(tmp_path / "list.npy", np.array(names, dtype), allow_pickle=True)
    source = factory.open_source(str(tmp_path / "list.npy"))
    assert records(source) == [(str(tmp_path / name), 0) for name in names]


@pytest.mark.parametrize("order", "<>")
def test_arrays_of_numpy_strings_as_objects(tmp_path, order):
    names = ["a é 日本.mp4", "b.mp4"]
    array = np.empty(2, object)
    array[:] = [np.array(name, f"{order}U20")[()] for name in names]
    np.save(tmp_path / "list.npy", array, allow_pickle=True)
    source = factory.VideoList.from_array_file(str(tmp_path / "list.npy"))
    assert records(source) == [(str(tmp_path / name), 0) for name in names]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_arrays_saved_by_other_versions_of_numpy(tmp_path, protocol):
    names = ["a é.mp4", "b.mp4", "a é.mp4"]
    array = np.array([*names, np.str_("c.mp4")], object)
    with open(tmp_path / "list.npy", "wb") as file:
        np.lib.format.write_array_header_1_0(
            file, np.lib.format.header_data_from_array_1_0(array)
        )
        pickled = pickle.dumps(array, protocol)
        if protocol == 3:
            pickled = pickled.replace(b"cnumpy._core.", b"cnumpy.core.")
        file.write(pickled)
    source = factory.VideoList.from_array_file(str(tmp_path / "list.npy"))
    expected = [(str(tmp_path / name), 0) for name in [*names, "c.mp4"]]
    assert records(source) == expected


def npy_bytes(array):
    content = io.BytesIO()
    np.save(content, array, allow_pickle=True)
    return content.getvalue()


def array_of_paths(kind):
    names = [f"folder {i % 3}/vidéo_{i}.mp4" for i in range(30)]
    array = np.array(names, str if kind == "str" else object)
    if kind == "numpy strings":
        array[:] = [np.str_(name) for name in names]
    return array


# NumPy's own reader crashes the process on such files.
@pytest.mark.parametrize("kind", ["objects", "numpy strings", "str"])
def test_damaged_arrays_of_paths_are_a_users_error(tmp_path, kind):
    whole = npy_bytes(array_of_paths(kind))
    path = tmp_path / "list.npy"
    num_refused = 0
    for _ in range(500):
        content = bytearray(whole)
        content[random.randrange(len(whole))] ^= random.randrange(1, 256)
        path.write_bytes(content)
        try:
            source = factory.VideoList.from_array_file(str(path))
        except UserError as error:
            assert str(error).startswith(f"{path} is no .npy array of paths: ")
            assert "\n" not in str(error) and len(str(error)) < 200 + len(str(path))
            num_refused += 1
        else:
            assert all("\0" not in record.path for record in source)
    assert num_refused


@pytest.mark.parametrize(
    "damage",
    [
        pickle.LONG_BINPUT,  # the bytes that follow index the table of known objects
        pickle.BYTEARRAY8 + (1 << 26).to_bytes(8, "little"),
    ],
)
def test_damaged_arrays_ask_for_no_more_memory_than_they_have(tmp_path, damage):
    whole = npy_bytes(array_of_paths("objects"))
    place = whole.index(b"folder") - 2
    damaged = whole[:place] + damage + whole[place + len(damage) :]
    (tmp_path / "list.npy").write_bytes(damaged)
    tracemalloc.start()
    with pytest.raises(UserError, match="array of paths: it is damaged"):
        factory.VideoList.from_array_file(str(tmp_path / "list.npy"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


class Evil:
    def __reduce__(self):
        return os.mkdir, ("/nowhere/evil",)


@pytest.mark.parametrize(
    "array, message",
    [
        (np.arange(3), "one-dimensional array of strings"),
        (np.array([["a", "b"]]), "one-dimensional array of strings"),
        (np.array(["a", 3], object), "entry 1 has the type int, not str"),
        (np.array(["a", np.int32(3)], object), "holds a value of type i4"),
        (np.array(["a", ""]), "entry 1 cannot be a path: ''"),
        (np.array(["a\0b"], object), "entry 0 cannot be a path"),
        (np.array(["\ud800"], object), "surrogates not allowed"),
        (np.array(["a", Evil()], object), "holds posix.mkdir, not only strings"),
    ],
)
def test_other_arrays_are_refused(tmp_path, array, message):
    np.save(tmp_path / "list.npy", array, allow_pickle=True)
    with pytest.raises(UserError, match=message):
        factory.open_source(str(tmp_path / "list.npy"))


def test_files_that_are_no_arrays_are_refused(tmp_path):
    whole = npy_bytes(np.array(["a", "b"], object))
    for content in (b"", b"text 1", whole[:-4], whole[:60]):
        (tmp_path / "list.npy").write_bytes(content)
        with pytest.raises(UserError, match=r"list\.npy is no \.npy array of paths"):
            factory.open_source(str(tmp_path / "list.npy"))
