import errno
import os
import pickle

import numpy as np
import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from list_files import make_files, records, relative_records, write_list

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources.file_lists import VideoList
from vjepa_jax.data.sources.open import open_mixture, open_source


def test_list_paths_are_resolved_against_the_list(tmp_path):
    path = write_list(tmp_path, "a.mp4 3\nsub/b.mp4 -1\n/elsewhere/c.mp4 0\n")
    assert records(VideoList.from_list_file(path)) == [
        (str(tmp_path / "a.mp4"), 3),
        (str(tmp_path / "sub/b.mp4"), -1),
        ("/elsewhere/c.mp4", 0),
    ]


@pytest.mark.parametrize(
    "line, entry",
    [
        ("a.mp4 7", "a.mp4"),
        ("my video (1).mp4 7", "my video (1).mp4"),
        ("two  spaces.mp4   7  ", "two  spaces.mp4"),
        ("a.mp4\t7", "a.mp4"),
        ("a.mp4::7", "a.mp4"),
        ("my video.mp4::7", "my video.mp4"),
        ("my video.mp4 :: 7", "my video.mp4"),
        ("a::b.mp4 7", "a::b.mp4"),
        ('"my video.mp4" 7', "my video.mp4"),
        ('"a ""b"".mp4" 7', 'a "b".mp4'),
        ("vidéo 日本.mp4 7", "vidéo 日本.mp4"),
    ],
)
def test_lines_of_a_list(tmp_path, line, entry):
    path = write_list(tmp_path, f"first.mp4 0\n\n{line}\n \n", encoding="utf-8")
    source = VideoList.from_list_file(path)
    assert records(source)[1:] == [(str(tmp_path / entry), 7)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_lists_with_byte_order_mark_and_carriage_returns(tmp_path, encoding, line_end):
    path = tmp_path / "train.csv"
    lines = ["\ufeffé 日本.mp4 1", "", "b.mp4\t2", ""]
    path.write_bytes(line_end.join(lines).encode(encoding))
    assert relative_records(VideoList.from_list_file(str(path)), tmp_path) == [
        ("é 日本.mp4", 1),
        ("b.mp4", 2),
    ]


@pytest.mark.parametrize(
    "content, message",
    [
        ("a.mp4 1\n".encode("utf-16-le"), "this is not UTF-8 text: save it as UTF-8"),
        ("a.mp4 1\n".encode("utf-16")[:-1], "begins like UTF-16 text, but is none"),
    ],
)
def test_lists_of_unknown_encodings_are_refused(tmp_path, content, message):
    path = tmp_path / "train.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        VideoList.from_list_file(str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "line, hint",
    [
        ("a.mp4,3", "separated by a space, a tab or '::'"),
        ("a.mp4, 3", "separated by a space, a tab or '::'"),
        ("# list 2", "remove comments"),
        ("my take 7 3", "put a path that ends in a number in double quotes"),
    ],
)
def test_bad_lines_say_what_to_do(tmp_path, line, hint):
    with pytest.raises(UserError, match=hint):
        VideoList.from_list_file(write_list(tmp_path, line))


@pytest.mark.parametrize("scheme", ["http", "https", "ftp", "file", "rtsp"])
def test_urls_are_not_downloaded(tmp_path, scheme):
    url = f"{scheme}://example.com/a.mp4"
    message = f"is a URL, but videos are not downloaded: '{url}'"
    path = write_list(tmp_path, f"a.mp4 1\n{url} 0\n")
    with pytest.raises(
        UserError, match=rf"train\.csv:2: the path {message}; download them"
    ):
        VideoList.from_list_file(path)
    np.save(tmp_path / "list.npy", np.array(["a.mp4", url]))
    with pytest.raises(UserError, match=f"entry 1 {message}"):
        VideoList.from_array_file(str(tmp_path / "list.npy"))
    with pytest.raises(UserError, match=f"data.path {message}"):
        open_source(url)


def test_urls_of_stores_may_be_listed(tmp_path):
    path = write_list(tmp_path, "gs://bucket/a b.mp4 3 4\n")
    assert records(VideoList.from_list_file(path)) == [("gs://bucket/a b.mp4", 3)]


def test_file_names_in_other_encodings_are_found(tmp_path):
    name = b"caf\xe9.mp4"
    with open(os.path.join(os.fsencode(tmp_path), name), "wb"):
        pass
    (tmp_path / "train.csv").write_bytes(name + b" 1\n")
    for path in (tmp_path, tmp_path / "train.csv"):
        assert os.path.exists(open_source(str(path))[0].path)


@pytest.mark.parametrize(
    "line",
    [
        *("path label", "a.mp4", "a.mp4 1.5", "a.mp4,3", " 3", "::3", "a\0b.mp4 3"),
        *("a.mp4, 3", "a.mp4;3", '"" 3', "a.mp4 3 b", "# list 2", "a.mp4 ３"),
        *("a.mp4 99999999999999999999", f"a.mp4::{2**63}", f"a.mp4 {-(2**63) - 1} "),
        *(f"a.mp4 {10**20} 3", f"a.mp4 {'9' * 5000}", f"a.mp4 {'9' * 5000} 3"),
    ],
)
def test_bad_lines_are_named(tmp_path, line):
    path = write_list(tmp_path, f"a.mp4 0\n\n{line}\n")
    with pytest.raises(UserError, match=r"train\.csv:3: expected 'path label'"):
        VideoList.from_list_file(path)


def test_messages_stay_on_one_short_line(tmp_path):
    path = write_list(tmp_path, "x" * 10000 + "\n")
    with pytest.raises(UserError) as caught:
        VideoList.from_list_file(path)
    assert len(str(caught.value)) < 400 + len(path)
    assert "\n" not in str(caught.value)


def test_folders_are_searched_in_sorted_order(tmp_path):
    make_files(
        tmp_path, "b/2.mp4", "b/deep/1.webm", "a/x.MOV", "a b/y.avi", "a/notes.txt"
    )
    (tmp_path / "empty").mkdir()
    assert relative_records(VideoList.from_folder(str(tmp_path)), tmp_path) == [
        ("a/x.MOV", 0),
        ("a b/y.avi", 1),
        ("b/2.mp4", 2),
        ("b/deep/1.webm", 2),
    ]


def test_videos_outside_class_folders_mean_there_are_no_classes(tmp_path):
    make_files(tmp_path, "b/1.mp4", "c/1.mp4", "z.mp4")
    source = VideoList.from_folder(str(tmp_path))
    assert [label for _, label in records(source)] == [0, 0, 0]


def test_hidden_files_are_skipped(tmp_path):
    make_files(tmp_path, "a.mp4", "._a.mp4", ".trash/b.mp4")
    source = VideoList.from_folder(str(tmp_path))
    assert relative_records(source, tmp_path) == [("a.mp4", 0)]


def test_linked_folders_are_followed_once(tmp_path):
    make_files(tmp_path / "disk", "1.mp4")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/class").symlink_to(tmp_path / "disk")
    (tmp_path / "disk/loop").symlink_to(tmp_path / "data")
    source = VideoList.from_folder(str(tmp_path / "data"))
    assert relative_records(source, tmp_path / "data") == [("class/1.mp4", 0)]


entries = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1
).filter(lambda entry: not entry.startswith("/"))


@given(st.lists(st.tuples(entries, st.integers(-(2**63), 2**63 - 1))))
def test_video_list_behaves_as_a_list(rows):
    source = VideoList(
        "x", "/root", [entry for entry, _ in rows], [label for _, label in rows]
    )
    expected = [(f"/root/{entry}", label) for entry, label in rows]
    assert len(source) == len(rows)
    assert records(source) == expected
    assert records(pickle.loads(pickle.dumps(source))) == expected
    if rows:
        assert source[-1] == source[len(rows) - 1]
    with pytest.raises(IndexError):
        source[len(rows)]
    np.testing.assert_array_equal(source.labels, [label for _, label in rows])


def test_video_list_is_compact():
    names = [f"some_class_name/video_{i:09}.mp4" for i in range(10000)]
    source = VideoList("x", "/root", names, range(10000))
    assert len(pickle.dumps(source)) < 10000 * (len(names[0]) + 16) + 2000


def test_open_source_takes_folders_and_lists(tmp_path):
    make_files(tmp_path, "a.mp4")
    path = write_list(tmp_path, "a.mp4 5\nmissing.mp4 6\n")
    assert len(open_source(str(tmp_path))) == 1
    assert len(open_source(path)) == 2


def test_open_source_says_what_is_wrong(tmp_path):
    make_files(tmp_path, "lone/a.mp4", "empty/notes.txt")
    for path, message in [
        ("", r"data\.path is not set"),
        (tmp_path / "nowhere", "nowhere' does not exist"),
        (tmp_path / "empty", "no videos or images in folder"),
        (tmp_path / "lone/a.mp4", "is a single video"),
        (write_list(tmp_path, "\n\n", "blank.csv"), r"blank\.csv' has no entries"),
    ]:
        with pytest.raises(UserError, match=message):
            open_source(str(path))


def test_lists_of_missing_files_are_refused(tmp_path):
    text = "".join(f"{i}.mp4 0\n" for i in range(2500))
    path = write_list(tmp_path, text)
    with pytest.raises(UserError, match="none of the 1000 files looked for") as caught:
        open_source(path)
    assert str(tmp_path / "0.mp4") in str(caught.value)
    assert "relative paths are resolved against the list's folder" in str(caught.value)
    make_files(tmp_path, "2490.mp4")
    assert len(open_source(path)) == 2500


def test_fingerprint_tells_streams_apart(tmp_path):
    def fingerprint(text, folder="one", **sampling):
        (tmp_path / folder).mkdir(exist_ok=True)
        source = VideoList.from_list_file(write_list(tmp_path / folder, text))
        return source.fingerprint(**sampling)

    base = fingerprint("a 1\nb 2\n", num_frames=16, crop_scale=(0.3, 1.0))
    assert len(base) == 64 and int(base, 16) >= 0
    others = [
        fingerprint("b 2\na 1\n", num_frames=16, crop_scale=(0.3, 1.0)),
        fingerprint("a 1\nb 3\n", num_frames=16, crop_scale=(0.3, 1.0)),
        fingerprint("ab 1\n 2\n".replace(" 2", "c 2"), num_frames=16),
        fingerprint("a 1\nb 2\n", num_frames=8, crop_scale=(0.3, 1.0)),
        fingerprint("a 1\nb 2\n", num_frames=16),
    ]
    assert len({base, *others}) == 6


def test_fingerprint_survives_moving_the_dataset(tmp_path):
    fingerprints = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        path = write_list(tmp_path / name, "a 1\nb 2\n")
        source = VideoList.from_list_file(path)
        # The order of the settings is no difference either.
        sampling = [("num_frames", 16), ("seed", 1)]
        sampling = sampling if name == "one" else sampling[::-1]
        fingerprints.add(source.fingerprint(**dict(sampling)))
    assert len(fingerprints) == 1


@pytest.mark.parametrize(
    "line, entry, label",
    [
        ("a.mp4 3 5", "a.mp4", 3),
        ("a.mp4::3::5", "a.mp4", 3),
        ("a.mp4 3 120 7", "a.mp4", 3),
        ("a.mp4 -1 150", "a.mp4", -1),
        ("a.mp4 -1 -1", "a.mp4", -1),
        ("a.mp4 3 1.5 2e3", "a.mp4", 3),
        ("a.mp4::-1::150", "a.mp4", -1),
        ("a.mp4\t-1\t150", "a.mp4", -1),
        ("a.mp4\t\t3", "a.mp4", 3),
        ("take 7\t3", "take 7", 3),
        ("take 7\t3\t5", "take 7", 3),
        ("take 7::3::5", "take 7", 3),
        ('"take 7" 3', "take 7", 3),
        ('"take 7" 3 5', "take 7", 3),
        ('"take 7"\t3', "take 7", 3),
        ('"take 7"::-3', "take 7", -3),
        ('"a.mp4" "3" "5"', "a.mp4", 3),
        ("my video.mp4 3", "my video.mp4", 3),
        ("my video.mp4 3 5", "my video.mp4", 3),
        ("my video 7.mp4 3", "my video 7.mp4", 3),
        ("my video 7.mp4 3 5", "my video 7.mp4", 3),
        ("my video 2.5 3", "my video 2.5", 3),
    ],
)
def test_of_further_columns_the_first_number_is_the_label(tmp_path, line, entry, label):
    source = VideoList.from_list_file(write_list(tmp_path, line + "\n"))
    assert relative_records(source, tmp_path) == [(entry, label)]


paths = st.text(
    st.characters(exclude_characters="\0\r\n", exclude_categories=["Cs"]), min_size=1
).filter(lambda path: "://" not in path)


@given(
    path=paths,
    labels=st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=3),
    separator=st.sampled_from([" ", "\t", "::", "  ", " :: "]),
)
def test_any_path_can_be_quoted(tmp_path_factory, path, labels, separator):
    folder = tmp_path_factory.mktemp("lists")
    quoted = '"' + path.replace('"', '""') + '"'
    line = separator.join([quoted, *map(str, labels)])
    list_path = write_list(folder, line + "\n", encoding="utf-8", newline="")
    source = VideoList.from_list_file(list_path)
    assert (source.entry(0), source.labels.tolist()) == (path, labels[:1])


@pytest.mark.parametrize("space", ["\u00a0", "\u202f", "\u3000"])
def test_other_spaces_are_a_part_of_names(tmp_path, space):
    path = write_list(tmp_path, f"take{space}7 3\n", encoding="utf-8")
    source = VideoList.from_list_file(path)
    assert relative_records(source, tmp_path) == [(f"take{space}7", 3)]


def test_labels_have_64_bits(tmp_path):
    labels = [2**63 - 1, -(2**63)]
    path = write_list(tmp_path, "".join(f"a.mp4 {label}\n" for label in labels))
    assert VideoList.from_list_file(path).labels.tolist() == labels


def test_errors_of_the_file_system_are_reported_in_one_line(tmp_path, monkeypatch):
    make_files(tmp_path, "a.mp4")
    path = write_list(tmp_path, "a.mp4 1\n")

    def refuse(self):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

    monkeypatch.setattr(type(epath.Path(path)), "read_bytes", refuse)
    for name in ("train.csv", "list.npy"):
        (tmp_path / name).touch()
        with pytest.raises(UserError, match=f"{name}' cannot be read: Permission"):
            open_source(str(tmp_path / name))


def test_a_folder_that_may_not_be_listed_is_refused(tmp_path, monkeypatch):
    make_files(tmp_path, "data/a.mp4", "data/lost+found/b.mp4")
    scandir = os.scandir

    def refuse_some(path):
        if str(path) in refused:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse_some)
    refused = [f"{tmp_path}/data/lost+found"]
    assert len(open_source(f"{tmp_path}/data")) == 1
    refused = [f"{tmp_path}/data"]
    with pytest.raises(UserError, match="data' cannot be read: Permission denied"):
        open_source(f"{tmp_path}/data")


def test_images_count_beside_videos(tmp_path):
    make_files(tmp_path, "cat/a.JPG", "cat/b.mp4", "dog/c.webp", "dog/d.png", "x.txt")
    source = open_source(str(tmp_path))
    assert [label for _, label in records(source)] == [0, 0, 1, 1]


def test_mixtures_have_weights(tmp_path):
    make_files(tmp_path, *(f"{i}.mp4" for i in range(3)))
    a = write_list(tmp_path, "0.mp4 1\n", "a.csv")
    b = write_list(tmp_path, "0.mp4 1\n1.mp4 1\n2.mp4 0\n", "b.csv")

    def weights(path, weights=()):
        mixture = open_mixture(path, weights)
        names = [source.name for source in mixture.sources]
        assert names == [a, b][: len(names)]
        return mixture.weights

    assert weights(a) == [1]
    assert weights(f"{a},{b}") == [0.25, 0.75]
    assert weights(f"{a}, {b}", (3, 1)) == [0.75, 0.25]
    assert weights(f"{a},{b}", (0.1, 0.3)) == pytest.approx([0.25, 0.75])


def test_a_path_with_a_comma_may_be_one_source(tmp_path):
    make_files(tmp_path, "a,b/0.mp4")
    mixture = open_mixture(str(tmp_path / "a,b"))
    assert (len(mixture), mixture.weights) == (1, [1])


@pytest.mark.parametrize(
    "weights, message",
    [
        ((1,), "data.mix_weights has 1 numbers but data.path names 2 sources"),
        ((1, 2, 3), "data.mix_weights has 3 numbers"),
        ((1, 0), "must be positive numbers, not 0"),
        ((-1, 1), "must be positive numbers, not -1"),
        ((1, float("nan")), "must be positive numbers, not nan"),
        ((1, float("inf")), "must be positive numbers, not inf"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, weights, message):
    make_files(tmp_path, "0.mp4")
    path = write_list(tmp_path, "0.mp4 1\n", "a.csv")
    with pytest.raises(UserError, match=message):
        open_mixture(f"{path},{path}", weights)


def test_nothing_between_commas_is_refused(tmp_path):
    make_files(tmp_path, "0.mp4")
    with pytest.raises(UserError, match="nothing between two commas"):
        open_mixture(f"{tmp_path},")
