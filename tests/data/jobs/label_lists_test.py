"""Lists made from a table hold the right files, classes and groups."""

import csv
import subprocess
import sys
from collections import Counter

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from list_files import make_files, records

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.jobs import label_lists
from vjepa_jax.data.jobs.label_lists import Choice, Condition, Split
from vjepa_jax.data.sources.file_lists import VideoList
from vjepa_jax.data.sources.open import open_source

COLUMNS = "file", "lab", "verb"
ROWS = [
    (
        f"clips/{i:02}.mp4",
        f"lab_{i % 4}",
        ("Put", "Place", "Take", "Open, wide")[i // 6],
    )
    for i in range(24)
]


def write_table(path, rows=ROWS, columns=COLUMNS, **form):
    with path.open("w", newline="") as file:
        csv.writer(file, **form).writerows([columns, *rows] if columns else rows)
    return path


@pytest.fixture
def table(tmp_path):
    make_files(tmp_path, *(row[0] for row in ROWS))
    return label_lists.read_table(str(write_table(tmp_path / "labels.csv")))


def make(table, split=None, **choice):
    choice.setdefault("root", table.name.rpartition("/")[0])
    return label_lists.make_lists(table, Choice(**{"file": "{file}", **choice}), split)


def run(*arguments):
    command = [sys.executable, "-m", "vjepa_jax.make_list", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_writes_lists_that_evaluations_open(table, tmp_path):
    arguments = (
        f"--table={table.name}",
        f"--output={tmp_path}/lists",
        "--label=verb",
        "--class=insert=Put,Place",
        '--class="Open, wide"',
        "--where=lab!=lab_1",
        "--split_by=lab",
        "--test_values=lab_3",
    )
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    names = (tmp_path / "lists/classes.txt").read_text().splitlines()
    assert names == ["Open, wide", "insert"]
    for name, labs in {"train": {"lab_0", "lab_2"}, "test": {"lab_3"}}.items():
        found = {
            (path, names[label])
            for path, label in records(open_source(f"{tmp_path}/lists/{name}.csv"))
        }
        class_of = {"Put": "insert", "Place": "insert", "Open, wide": "Open, wide"}
        assert found == {
            (f"{tmp_path}/{file}", class_of[verb])
            for file, lab, verb in ROWS
            if lab in labs and verb != "Take"
        }
    written = (tmp_path / "lists/train.csv").read_bytes()
    assert run(*arguments).returncode == 0  # the same lists again
    done = run(*arguments[:2], "--label=verb")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "train.csv exists with other content" in done.stderr
    assert (tmp_path / "lists/train.csv").read_bytes() == written


def test_without_a_label_all_files_are_listed(table, tmp_path):
    lists = make(table)
    assert label_lists.write_lists(lists, str(tmp_path)) == [f"{tmp_path}/train.csv"]
    # Below the folder of the list, paths are relative: both can be moved together.
    lines = (tmp_path / "train.csv").read_text().splitlines()
    assert lines == [f"{file} 0" for file, _, _ in ROWS]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_labs", [2, 5, 40])
def test_share_of_groups_is_balanced(tmp_path, seed, num_labs):
    rng = np.random.default_rng(seed)
    lab_of = rng.integers(0, num_labs, 400)
    rows = [
        (f"{i}.mp4", lab, "ab"[int(rng.random() < 0.3)]) for i, lab in enumerate(lab_of)
    ]
    table = label_lists.read_table(str(write_table(tmp_path / "t.csv", rows)))
    split = Split("lab", test_share=0.25, seed=seed)
    lists = make(table, split, label="verb", missing_files="keep")
    lab = {f"{tmp_path}/{file}": str(lab) for file, lab, _ in rows}
    labs = [{lab[path] for path, _ in lists.files[name]} for name in lists.files]
    assert not labs[0] & labs[1] and all(labs)
    assert sum(map(len, lists.files.values())) == 400
    if num_labs == 40:  # groups of 10: no class is further away than a few of them
        for counts in lists.counts().values():
            assert abs(counts[1] / sum(counts) - 0.25) < 0.12
    assert make(table, split, label="verb", missing_files="keep") == lists


def test_without_a_column_files_are_divided(table):
    lists = make(table, Split(test_share=0.5), label="verb")
    assert lists.counts() == {name: [3, 3] for name in lists.classes}


def test_classes_need_rows_in_every_list(table):
    # The first six rows are a class.
    split = Split("file", test_values=[file for file, *_ in ROWS[:5]])
    lists = make(table, split, label="verb", min_rows=1)
    assert lists.classes == ["Put"] and "Take" in lists.left_out
    assert "left out" in lists.summary()
    assert make(table, split, label="verb").counts()["Take"] == [6, 0]
    split = Split("file", test_values=[file for file, *_ in ROWS[:6]])
    with pytest.raises(UserError, match="'Put' has 6 rows to test on and none to"):
        make(table, split, label="verb")
    with pytest.raises(UserError, match="no class has --min_rows=7"):
        make(table, label="verb", min_rows=7)


def test_files_come_from_several_columns(tmp_path):
    path = write_table(
        tmp_path / "k.tsv",
        [("dance well", "aXb", "7"), ("sing", "c-d", "12")],
        columns=None,
        delimiter="\t",
    )
    table = label_lists.read_table(str(path), "\t", ["label", "id", "start"])
    lists = make(
        table,
        file="{label}/{id}_{start:0>6}.mp4",
        root="gs://bucket/k",
        label="label",
        missing_files="keep",
    )
    assert lists.files["train.csv"] == [
        ("gs://bucket/k/dance well/aXb_000007.mp4", "dance well"),
        ("gs://bucket/k/sing/c-d_000012.mp4", "sing"),
    ]


def test_remote_files_are_looked_for(bucket):
    table = b"file,verb\na b.mp4,put\nc.mp4,take\n"
    bucket({"gs://b/labels.csv": table, "gs://b/v/a b.mp4": b"v"})
    table = label_lists.read_table("gs://b/labels.csv")
    lists = make(table, root="gs://b/v", label="verb", missing_files="skip")
    assert lists.missing == ["gs://b/v/c.mp4"]
    label_lists.write_lists(lists, "gs://b/v")
    source = open_source("gs://b/v/train.csv")
    assert records(source) == [("gs://b/v/a b.mp4", 0)]
    assert source.entry(0) == "a b.mp4" and source.class_names == ["put"]


def test_missing_files_are_counted(table, tmp_path):
    (tmp_path / ROWS[3][0]).unlink()
    with pytest.raises(UserError, match=r"1 files of .* do not exist, such as .*03"):
        make(table)
    lists = make(table, missing_files="skip")
    assert lists.missing == [f"{tmp_path}/{ROWS[3][0]}"]
    assert len(lists.files["train.csv"]) == 23
    assert "left out: 1 files that do not exist" in lists.summary()
    assert len(make(table, missing_files="keep").files["train.csv"]) == 24


@pytest.mark.parametrize(
    ("choice", "split", "message"),
    [
        ({"label": "verbs"}, None, "no column 'verbs'; its columns: file, lab, verb"),
        ({"file": "{name}"}, None, "no column 'name'"),
        ({"file": "x.mp4"}, None, "names no column"),
        ({"file": "{file:d}"}, None, "Unknown format code"),
        ({"classes": {"a": ("Put",)}}, None, "--class needs --label"),
        ({"label": "verb", "classes": {"a": ("Pu",)}}, None, "no row of .* verb 'Pu'"),
        ({"conditions": ["lab=lab_9"]}, None, "has the lab 'lab_9'; there is: lab_0"),
        ({"conditions": ["x!=1"]}, None, "no column 'x'"),
        ({"conditions": ["lab=lab_0", "lab!=lab_0"]}, None, "meets all conditions"),
        ({}, Split("lab"), "--test_values or --test_share"),
        ({}, Split("lab", ["lab_1"], 0.5), "--test_values or --test_share"),
        ({}, Split("lab", ["lab_7"]), "no chosen row has the lab 'lab_7'"),
        ({}, Split("lab", test_share=1.5), "between 0 and 1"),
        ({}, Split("", ["lab_1"]), "--test_values needs --split_by"),
        ({}, Split("lab", [f"lab_{i}" for i in range(4)]), "none trained on"),
        (
            {"conditions": ["lab=lab_0"]},
            Split("lab", test_share=0.5),
            "cannot be split",
        ),
    ],
)
def test_mistakes_are_named(table, choice, split, message):
    if "conditions" in choice:
        texts = choice["conditions"]
        choice = {**choice, "conditions": [Condition.parse(text) for text in texts]}
    with pytest.raises(UserError, match=message):
        make(table, split, **choice)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a.mp4", "x", "Put"), ("a.mp4", "x", "Take")], "line 2"),
        ([("a.mp4", "x", "Put"), ("a.mp4", "y", "Put")], "1 files would be trained"),
        ([("a.mp4", "x", "Put"), ("b.mp4", "y", " ")], ":3: no verb"),
        ([("a.mp4", "x", "Put"), ("", "y", "Put")], ":3: no file"),
        ([("a\nb.mp4", "x", "Put")], "cannot be in a list"),
        ([("https://a.com/b.mp4", "x", "Put")], ":2: the path is a URL"),
    ],
)
def test_rows_that_contradict_are_named(tmp_path, rows, message):
    table = label_lists.read_table(str(write_table(tmp_path / "t.csv", rows)))
    with pytest.raises(UserError, match=message):
        make(table, Split("lab", ["x"]), label="verb", missing_files="keep")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"file,verb\na.mp4\n", r"t\.csv:2: 1 fields, but 2 columns: file, verb"),
        (b"file,file\na,b\n", "two columns 'file'"),
        (b"file,verb\n\n", "has no rows"),
        (b'file,verb\n"a,b\n', r"t\.csv:2: "),
        ("file,verb\na,caf\u00e9\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_damaged_tables_are_named(tmp_path, content, message):
    (tmp_path / "t.csv").write_bytes(content)
    with pytest.raises(UserError, match=message):
        label_lists.read_table(str(tmp_path / "t.csv"))
    with pytest.raises(UserError, match="cannot be read: No such file"):
        label_lists.read_table(str(tmp_path / "none.csv"))


@pytest.mark.parametrize("delimiter", [";", "\t", " ", "|"])
def test_delimiters(tmp_path, delimiter):
    rows = [("a b.mp4", "x", "Put, in"), ("c.mp4", "y", "Take")]
    path = str(write_table(tmp_path / "t.csv", rows, delimiter=delimiter))
    table = label_lists.read_table(path, delimiter)
    assert [tuple(row.values()) for row in table.rows] == rows
    for wrong in ("", "::", '"', "\n"):
        with pytest.raises(UserError, match="is not one character, or tab"):
            label_lists.read_table(path, wrong)
    (tmp_path / "t.csv").write_text(delimiter.join(["file", "verb\na.mp4", "put\n"]))
    with pytest.raises(UserError, match=r"no column 'file'.*set --delimiter"):
        make(label_lists.read_table(path))


def test_classes_are_read_from_flags():
    read = label_lists.parse_classes(["a b=x, y", 'z,"u,v"', '"k=l"'])
    assert read == {
        "a b": ("x", "y"),
        "z": ("z",),
        "u,v": ("u,v",),
        "k=l": ("k=l",),
    }
    for texts in (["a=x", "x"], ["a=x,x"]):
        with pytest.raises(UserError, match="'x' is already in the class 'a'"):
            label_lists.parse_classes(texts)
    for texts in (["a=x", "a=y"], ["a="], [""]):
        with pytest.raises(UserError, match=r"twice|without empty"):
            label_lists.parse_classes(texts)


NAMES = st.text(
    st.characters(
        exclude_categories=["Cs", "Cc", "Zl", "Zp"], exclude_characters="/\0"
    ),
    min_size=1,
).map(lambda name: f"{name.strip()}x")


@hypothesis.settings(deadline=None, max_examples=50)
@hypothesis.given(st.dictionaries(NAMES, st.sampled_from("abc"), min_size=1))
def test_any_name_of_a_file_is_read_back(tmp_path_factory, class_of):
    folder = tmp_path_factory.mktemp("names")
    rows = [(name, "lab", label) for name, label in class_of.items()]
    table = label_lists.read_table(str(write_table(folder / "t.csv", rows)))
    lists = make(table, label="verb", missing_files="keep")
    label_lists.write_lists(lists, str(folder))
    source = VideoList.from_list_file(str(folder / "train.csv"))
    found = {path: lists.classes[label] for path, label in records(source)}
    assert found == {f"{folder}/{name}": label for name, label in class_of.items()}
    assert Counter(found.values()) == Counter(
        {name: counts[0] for name, counts in lists.counts().items()}
    )
