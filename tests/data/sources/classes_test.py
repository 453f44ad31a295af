"""Classes of several sources get one number per name."""

import json
import pickle

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from list_files import make_files, write_list

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources import shards
from vjepa_jax.data.sources.classes import unite_classes
from vjepa_jax.data.sources.file_lists import VideoList
from vjepa_jax.data.sources.open import open_source
from vjepa_jax.data.sources.records import Joined, Subset


def write_folders(folder, **counts):
    """Write class folders with so many empty videos; return the folder's source."""
    for name, count in counts.items():
        make_files(folder, *(f"{name}/{i}.mp4" for i in range(count)))
    return open_source(str(folder))


def named(source):
    """Return the names of the classes of all records, which labels agree with."""
    assert [record.label for record in source] == source.labels.tolist()
    return [source.class_names[label] for label in source.labels]


def folders_of(source):
    return [source.path_of(i).split("/")[-2] for i in range(len(source))]


@hypothesis.settings(deadline=None, max_examples=30)
@hypothesis.given(
    st.lists(
        st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 3), min_size=1),
        min_size=1,
        max_size=4,
    )
)
def test_a_class_is_its_name_in_every_folder(tmp_path_factory, counts):
    root = tmp_path_factory.mktemp("folders")
    sources = [
        write_folders(root / str(i), **of_folder) for i, of_folder in enumerate(counts)
    ]
    united = unite_classes(sources)
    every = sorted({name for of_folder in counts for name in of_folder})
    for source, before in zip(united, sources, strict=True):
        assert source.class_names == every
        assert named(source) == folders_of(source) == folders_of(before)
        assert source.digest() == before.digest()
        assert named(pickle.loads(pickle.dumps(source))) == named(source)
    joined = Joined(united)
    assert named(joined) == folders_of(joined)
    backwards = Subset(joined, np.arange(len(joined))[::-1])
    assert named(backwards) == folders_of(backwards)


def test_without_a_common_numbering_a_mixture_has_no_names(tmp_path):
    first = write_folders(tmp_path / "1", a=1, b=1)
    second = write_folders(tmp_path / "2", b=1)
    assert Joined([first, first]).class_names == ["a", "b"]
    assert Joined([first, second]).class_names is None
    assert Joined([first, second]).source_of(2) is second


def test_accents_have_two_encodings(tmp_path):
    composed, separate = "caf\u00e9", "cafe\u0301"
    first = write_folders(tmp_path / "1", **{composed: 1}, a=1)
    make_files(tmp_path / "2", f"{separate}/1.mp4")  # Python composes keywords
    first, second = unite_classes([first, open_source(str(tmp_path / "2"))])
    assert named(first) == ["a", composed] and named(second) == [composed]


def test_lists_have_names_beside_them(tmp_path):
    folders = write_folders(tmp_path / "folders", put=1, take=1)
    text = "x.mp4 0\ny.mp4 1\nz.mp4 1\n"
    listed = VideoList.from_list_file(write_list(tmp_path, text))
    assert listed.class_names is None
    with pytest.raises(UserError, match=r"names of classes \(put, take\), but .*train"):
        unite_classes([folders, listed])
    (tmp_path / "classes.txt").write_text("take\nput\n\n", encoding="utf-8-sig")
    listed = VideoList.from_list_file(str(tmp_path / "train.csv"))
    united = unite_classes([folders, listed])
    assert named(united[0]) == ["put", "take"]
    assert named(united[1]) == ["take", "put", "put"]
    # Alone, the list keeps its numbers.
    (alone,) = unite_classes([listed])
    assert alone.labels.tolist() == [0, 1, 1]
    assert alone.class_names == ["take", "put"]


def test_lists_without_names_keep_their_numbers(tmp_path):
    lists = [
        VideoList.from_list_file(write_list(tmp_path, text, name))
        for name, text in (("a.csv", "x.mp4 3\n"), ("b.csv", "y.mp4 7\nz.mp4 3\n"))
    ]
    united = unite_classes(lists)
    assert [s.labels.tolist() for s in united] == [[3], [7, 3]]
    # Folders named by numbers are those numbers beside lists; 10 comes before 2.
    numbered = write_folders(tmp_path / "folders", **{"10": 1, "2": 2, "7": 1})
    united = unite_classes([numbered, *lists])
    assert united[0].labels.tolist() == [10, 2, 2, 7]
    assert [s.class_names for s in united] == [None] * 3
    with pytest.raises(UserError, match=r"\(01, 2\)"):
        unite_classes([write_folders(tmp_path / "zeros", **{"01": 1, "2": 1}), *lists])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (b"put\n\ntake\n", r"classes\.txt:2 is empty"),
        (b"put\ntake\nput\n", r"classes\.txt:3 repeats 'put'"),
        (b"put\n", r"c\.mp4' of .* has the label 1, but only 1 classes have names"),
        (b"\xff\xfe\0\xd8", "begins like UTF-16"),
    ],
)
def test_wrong_names_are_reported_when_they_are_used(tmp_path, names, message):
    (tmp_path / "classes.txt").write_bytes(names)
    source = VideoList.from_list_file(write_list(tmp_path, "b.mp4 0\nc.mp4 1\n"))
    assert source.labels.tolist() == [0, 1]  # pretraining does not ask for names
    with pytest.raises(UserError, match=message):
        unite_classes([source])


def test_sources_say_why_they_have_no_classes(tmp_path):
    make_files(tmp_path / "mixed", "a/1.mp4", "b/1.mp4", "cover.jpg")
    source = open_source(str(tmp_path / "mixed"))
    assert "1 of its 3 files lie above class folders, such as 'cover.jpg'" in (
        source.unlabelled
    )
    assert source.class_names is None
    np.save(tmp_path / "list.npy", np.array(["x.mp4"]))
    assert (
        "has no labels"
        in VideoList.from_array_file(str(tmp_path / "list.npy")).unlabelled
    )
    assert not write_folders(tmp_path / "folders", a=1).unlabelled


def test_shards_keep_the_names_of_their_manifest(tmp_path, caplog):
    records = [
        shards.VideoRecord(b"video", label, f"{label}.mp4", "", 1.0, 1, 2, 2)
        for label in (1, 0)
    ]
    name = shards.shard_name(0, 1)
    path = tmp_path / f"{name}{shards.SUFFIX}"
    shards.write_shard(str(path), records)
    manifest = {
        "format": shards.FORMAT,
        "settings": {},
        "index": shards.write_index(
            str(tmp_path), [(r.id, r.label, 1) for r in records]
        ),
        "shards": [{"name": name, "num_records": 2, "num_bytes": path.stat().st_size}],
    }
    for names in (["put", "take"], None):
        content = manifest | {shards.CLASS_NAMES: names}
        (tmp_path / shards.MANIFEST).write_text(json.dumps(content))
        source = open_source(str(tmp_path))
        assert source.class_names == names
    assert not caplog.text
    # Of shards that an earlier version wrote.
    (tmp_path / shards.MANIFEST).write_text(json.dumps(manifest))
    assert open_source(str(tmp_path)).class_names is None
    assert "were prepared without the names of their classes" in caplog.text
    folders = write_folders(tmp_path / "folders", put=1)
    with pytest.raises(UserError, match="shards: prepare them again"):
        unite_classes([open_source(str(tmp_path)), folders])
