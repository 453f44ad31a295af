"""Files appear when they are complete; URLs are not local paths."""

import os
import pathlib

import numpy as np
import pytest
from damaged_files import damage, empty, flip, halve, zeros

from vjepa_jax.base import files
from vjepa_jax.base.errors import UserError


def test_urls_are_remote_and_stay_as_they_are():
    assert files.is_remote("gs://bucket/a") and not files.is_remote("a/b:c")
    assert files.absolute("gs://bucket/../a") == "gs://bucket/../a"


def test_local_paths_become_absolute():
    assert files.absolute("a/../b") == os.path.join(os.getcwd(), "b")
    assert files.absolute("~/a") == os.path.expanduser("~/a")
    assert not files.is_remote(pathlib.Path("a"))


@pytest.mark.parametrize("content", [b"new", "new"])
def test_file_is_replaced_when_complete(tmp_path, content):
    (tmp_path / "a").write_text("old")
    files.write_whole(tmp_path / "a", content)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "new"


def test_failed_write_leaves_the_old_file_alone(tmp_path):
    (tmp_path / "a").write_text("old")
    with (
        pytest.raises(OSError, match="disk full"),
        files.renamed_when_complete(tmp_path / "a") as part,
    ):
        part.write_text("half")
        raise OSError("disk full")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_folder_is_renamed_or_removed(tmp_path):
    for is_complete in (False, True):
        try:
            with files.renamed_when_complete(str(tmp_path / "out")) as part:
                part.mkdir()
                (part / "inside").write_text("x")
                if not is_complete:
                    raise ValueError
        except ValueError:
            assert not list(tmp_path.iterdir())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-be"])
def test_text_is_read_by_its_byte_order_mark(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffé 日本\r\n".encode(encoding))
    assert files.read_text(path) == "é 日本\r\n"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff" * (encoding == "utf-8"))
    if encoding == "utf-8":  # as in names of files
        assert files.read_text(path) == "é 日本\r\udcff"
    else:
        with pytest.raises(UserError, match=r"a\.txt begins like UTF-\d+ text, but"):
            files.read_text(path)


@pytest.mark.parametrize("how", [halve, empty, zeros, flip, None])
def test_arrays_that_are_damaged_are_named_with_the_fix(tmp_path, rng, how):
    path = tmp_path / "a.npz"
    wanted = {"x": rng.random(500), "names": np.array(["a", "bc"])}
    np.savez(path, **wanted)
    found = files.read_arrays(path, "write it again")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value)
    damage(path, how)
    with pytest.raises(UserError, match=r"a\.npz is missing or damaged \(") as error:
        files.read_arrays(path, "write it again")
    message = str(error.value)
    assert message.endswith(": write it again") and "\n" not in message


def test_a_pickle_among_arrays_is_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([{}], object))
    with pytest.raises(UserError, match="missing or damaged"):
        files.read_arrays(tmp_path / "a.npz", "write it again")
