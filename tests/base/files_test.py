"""Files appear when they are complete; URLs are not local paths."""

import os
import pathlib

import pytest

from vjepa_jax.base import files


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
