r"""Make list files for training and evaluation from a table (CSV) of labels.

    python -m vjepa_jax.make_list --table=labels.csv --output=DIR
    python -m vjepa_jax.make_list --table=labels.csv --output=DIR --label=verb \
        --class="insert=Put,Place" --class="remove=Remove,Take" \
        --where="scene!=Bathroom" --split_by=lab --test_values=lab_07,lab_08

The first command lists all files, for pretraining. The second writes train.csv and
test.csv, with no lab in both, and classes.txt: the names of the classes in the order of
their labels. Values with commas stand in double quotes. See docs/data.md.
"""

import os

from absl import flags

from vjepa_jax.data.jobs import label_lists
from vjepa_jax.run import cli


def main() -> None:
    """Run the command line."""
    path = _TABLE.value
    delimiter = "\t" if _DELIMITER.value == "tab" else _DELIMITER.value
    table = label_lists.read_table(path, delimiter, _HEADER.value)
    choice = label_lists.Choice(
        file=_FILE.value,
        root=os.path.dirname(table.name) if _ROOT.value is None else _ROOT.value,
        label=_LABEL.value,
        classes=label_lists.parse_classes(_CLASS.value),
        conditions=[label_lists.Condition.parse(text) for text in _WHERE.value],
        min_rows=_MIN_ROWS.value,
        missing_files=_MISSING_FILES.value,
    )
    split = None
    if _SPLIT_BY.value or _TEST_VALUES.value or _TEST_SHARE.value:
        values = label_lists.split_values(_TEST_VALUES.value or "")
        split = label_lists.Split(
            _SPLIT_BY.value,
            values if any(values) else (),
            _TEST_SHARE.value,
            _SEED.value,
        )
    lists = label_lists.make_lists(table, choice, split)
    written = label_lists.write_lists(lists, _OUTPUT.value)
    print(lists.summary())
    print("written: " + ", ".join(written))


if __name__ == "__main__":
    _TABLE = flags.DEFINE_string(
        "table", None, "Table of one row per file, local or remote", required=True
    )
    _OUTPUT = flags.DEFINE_string("output", None, "Folder of the lists", required=True)
    _DELIMITER = flags.DEFINE_string("delimiter", ",", "Between fields; or tab")
    _HEADER = flags.DEFINE_list(
        "header", None, "Names of the columns of a table whose first line is a row"
    )
    _FILE = flags.DEFINE_string(
        "file", "{file}", "Path of a row's file, such as {class}/{id:0>6}.mp4"
    )
    _ROOT = flags.DEFINE_string(
        "root", None, "Folder or URL of relative paths; default: the table's folder"
    )
    _MISSING_FILES = flags.DEFINE_enum(
        "missing_files",
        "refuse",
        label_lists.MISSING,
        "Files that do not exist: an error, left out, or listed without a look",
    )
    _LABEL = flags.DEFINE_string("label", "", "Column of the classes")
    _CLASS = flags.DEFINE_multi_string(
        "class",
        [],
        "NAME=VALUE,... is one class of several values of the column, VALUE,... are "
        "classes of one value each; default: every value. May be repeated",
    )
    _WHERE = flags.DEFINE_multi_string(
        "where",
        [],
        "COLUMN=VALUE,... or COLUMN!=VALUE,...: rows to keep; all must hold",
    )
    _MIN_ROWS = flags.DEFINE_integer(
        "min_rows",
        0,
        "Classes with fewer rows in one of the lists are left out",
        lower_bound=0,
    )
    _SPLIT_BY = flags.DEFINE_string(
        "split_by",
        "",
        "Column whose values lie in one of both lists; default: the file",
    )
    _TEST_VALUES = flags.DEFINE_string(
        "test_values", "", "VALUE,... of that column to test on"
    )
    _TEST_SHARE = flags.DEFINE_float(
        "test_share", 0.0, "Or the share of the rows to test on, in whole values"
    )
    _SEED = flags.DEFINE_integer("seed", 0, "Of the choice by --test_share")
    cli.run(main)
