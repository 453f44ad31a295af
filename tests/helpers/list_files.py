"""Lists of videos for tests, and what is read from them."""

import os


def make_files(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def write_list(folder, text, name="train.csv", **kwargs):
    path = folder / name
    path.write_text(text, **kwargs)
    return str(path)


def records(source):
    return [(record.path, record.label) for record in source]


def relative_records(source, folder):
    return [(os.path.relpath(path, folder), label) for path, label in records(source)]
