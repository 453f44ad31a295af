"""Annotations of EPIC-KITCHENS-100 are read; contexts end before actions."""

import numpy as np
import pytest
import video_files
from kitchen_files import FPS, stamp, write_annotations

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.sources.records import Record
from vjepa_jax.evals.anticipation.epic_kitchens import (
    Classes,
    ContextReader,
    Contexts,
    read_actions,
)

SIDE = 16
ROWS = [
    ("P01_01", 2.0, 3.5, 3, 1),
    ("P01_01", 0.25, 0.75, 0, 17),
    ("P02_103", 3661.5, 3662.25, 3, 17),
    ("P01_01", 9.5, 9.75, 0, 1),
    ("P01_01", 4.0, 6.0, 3, 1),
]


@pytest.fixture
def actions(tmp_path):
    return read_actions(write_annotations(tmp_path / "EPIC_100_train.csv", ROWS))


@pytest.fixture(scope="module")
def kitchen(tmp_path_factory):
    """Write a video of 10 s whose frames all differ."""
    root = tmp_path_factory.mktemp("kitchen")
    grey = np.arange(100, dtype=np.uint8)[:, None, None, None] * 2 + 20
    frames = np.broadcast_to(grey, (100, SIDE, SIDE, 3))
    (root / "P01").mkdir()
    options = {"codec_options": {"crf": "1", "g": "10"}, "fps": FPS}
    video_files.write_video(root / "P01" / "P01_01.MP4", frames, **options)
    return str(root)


def contexts_of(actions, kitchen, anchor="paper", point=0.0, ahead_secs=1.0):
    labels = np.arange(len(actions))
    return Contexts(
        actions, labels, kitchen, anchor=anchor, point=point, ahead_secs=ahead_secs
    )


def test_annotations_are_read_as_released(actions):
    assert len(actions) == len(ROWS)
    assert actions.video.tolist() == [row[0] for row in ROWS]
    np.testing.assert_allclose(actions.start_secs, [row[1] for row in ROWS])
    np.testing.assert_allclose(actions.stop_secs, [row[2] for row in ROWS])
    assert actions.start_frame.tolist() == [20, 2, 36615, 95, 40]
    assert actions.stop_frame.tolist() == [35, 7, 36622, 97, 60]
    assert actions.verb.tolist() == [3, 0, 3, 0, 3]
    assert actions.noun.tolist() == [1, 17, 17, 1, 1]
    assert stamp(3661.5) == "01:01:01.50"  # what the seconds were read from
    some = actions.take(np.array([2, 0]))
    assert some.noun.tolist() == [17, 1] and some.name == actions.name


def test_classes_are_the_pairs_of_the_training_list(tmp_path, actions):
    classes = Classes.of(actions)
    assert classes.verbs.tolist() == [0, 3] and classes.nouns.tolist() == [1, 17]
    assert classes.actions.tolist() == [[0, 1], [0, 17], [3, 1], [3, 17]]
    assert classes.labels(actions).tolist() == [2, 1, 3, 0, 2]
    assert classes.counts == {"verb": 2, "noun": 2, "action": 4}
    tables = {name: t.tolist() for name, t in classes.tables().items()}
    assert tables == {
        "verb": [0, 0, 1, 1],
        "noun": [0, 1, 0, 1],
        "action": [0, 1, 2, 3],
    }
    others = [("P03_01", 1, 2, 3, 2), ("P03_01", 1, 2, 0, 17), ("P03_01", 1, 2, 4, 1)]
    others = read_actions(write_annotations(tmp_path / "other.csv", others))
    assert classes.labels(others).tolist() == [-1, 1, -1]


def plain_frames(row, anchor, rule, point, ahead_secs, num_frames, fps):
    """Choose the frames of a context, by the paper's or the released code's formula."""
    _, start, stop, *_ = row
    if rule == "official":
        start, stop = int(start * FPS), int(stop * FPS)
    if anchor == "paper":
        moment = start + point * (stop - start)
    else:
        moment = start * point + (1 - point) * stop
    if rule == "official":
        step = FPS // fps
        end = int(moment - int(ahead_secs * FPS))
        frames = list(range(end - num_frames * step, end, step))
    else:
        end = moment - ahead_secs
        frames = [
            np.floor((end - i / fps) * FPS + 0.5 + 1e-6)
            for i in range(num_frames, 0, -1)
        ]
    return np.clip(frames, 0, 99).astype(int)


@pytest.mark.parametrize("rule", ["exact", "official"])
@pytest.mark.parametrize("anchor", ["paper", "released"])
def test_contexts_end_before_the_moment(rng, actions, kitchen, anchor, rule):
    """Contexts of training, too, and contexts that begin before the video."""
    actions = actions.take(actions.video == "P01_01")
    rows = [row for row in ROWS if row[0] == "P01_01"]
    reader = ContextReader(Sampling(6, fps=5, rule=rule), SIDE)
    frames = video_files.decode_plainly(f"{kitchen}/P01/P01_01.MP4")
    assert len(np.unique(frames[:, 0, 0, 0])) == 100
    for point, ahead_secs in (
        (0.0, 1.0),
        (rng.uniform(0, 0.25, 4), rng.uniform(0.25, 1.75, 4)),
    ):
        contexts = contexts_of(actions, kitchen, anchor, point, ahead_secs)
        points, aheads = np.broadcast_to(point, 4), np.broadcast_to(ahead_secs, 4)
        for i, row in enumerate(rows):
            clip = reader.read(contexts[i], lambda h, w: (0, 0, h, w))
            assert clip.shape == (1, 6, SIDE, SIDE, 3)
            wanted = plain_frames(row, anchor, rule, points[i], aheads[i], 6, 5)
            np.testing.assert_array_equal(clip[0], frames[wanted])
            assert contexts[i].label == i
    assert wanted[0] != wanted[-1]


def test_the_anchors_differ_by_the_action(actions, kitchen):
    """At point 0 the paper takes the first frame, the released code the last one."""
    moments = {
        anchor: [c.moment_secs for c in contexts_of(actions, kitchen, anchor)]
        for anchor in ("paper", "released")
    }
    np.testing.assert_array_equal(moments["paper"], actions.start_secs)
    np.testing.assert_array_equal(moments["released"], actions.stop_secs)
    seen = contexts_of(actions, kitchen, "released").sees_action()
    # Actions longer than the second before which the context ends.
    assert seen.tolist() == [True, False, False, False, True]
    assert not contexts_of(actions, kitchen, "paper").sees_action().any()


def test_contexts_are_a_source(actions, kitchen):
    contexts = contexts_of(actions, kitchen, ahead_secs=np.arange(5.0))
    assert len(contexts) == 5 and isinstance(contexts[0], Record)
    assert contexts[-1] == contexts[4] != contexts[0]
    assert contexts[2].path == contexts.path_of(2) == f"{kitchen}/P02/P02_103.MP4"
    assert contexts.ahead_secs.tolist() == [0, 1, 2, 3, 4]
    others = (
        contexts_of(actions, kitchen, ahead_secs=np.arange(5.0), anchor="released"),
        contexts_of(actions, kitchen, ahead_secs=np.arange(5.0)[::-1]),
        contexts_of(actions.take(np.arange(4)), kitchen, ahead_secs=np.arange(4.0)),
    )
    digests = {source.digest() for source in (contexts, *others)}
    assert len(digests) == 4
    again = contexts_of(actions, kitchen, ahead_secs=np.arange(5.0))
    assert again.digest() == contexts.digest()


@pytest.mark.parametrize(
    "file",
    ["P01/videos/P01_01.MP4", "P01/P01_01.MP4", "P01_01.MP4", "P01/P01_01.mp4"],
)
def test_layouts_of_the_videos(tmp_path, actions, file):
    """The first video that exists determines the layout of all."""
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    actions = actions.take(np.array([2, 0]))
    contexts = contexts_of(actions, str(tmp_path))
    assert contexts.path_of(1) == str(tmp_path / file)
    missing = file.replace("P01_01", "P02_103").replace("P01", "P02")
    assert contexts.path_of(0) == str(tmp_path / missing)


@pytest.mark.parametrize("path", ["", "nowhere"])
def test_a_folder_without_the_videos_is_named(tmp_path, actions, path):
    path = path and str(tmp_path / path)
    message = "none of the 2 videos of .* looked for P01/videos/P01_01.MP4 or"
    with pytest.raises(UserError, match=message if path else "videos_path is not set"):
        contexts_of(actions, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path label\na.mp4 1\n", r"x\.csv:2: not an annotation .*KeyError"),
        ("", "have no rows"),
        ("video_id,start_timestamp\n", "have no rows"),
        (None, "cannot be read"),
        (b"\xff\xfe\x00", "cannot be read"),
    ],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "x.csv"
    if isinstance(content, str):
        path.write_text(content)
    elif content:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        read_actions(str(path))
    assert "\n" not in str(error.value)


def test_a_bad_line_is_named(tmp_path):
    path = tmp_path / "x.csv"
    write_annotations(path, ROWS)
    for old, new in (("00:00:09.50", "9.5"), ("00:00:09.50", ""), (",95,", ",?,")):
        (tmp_path / "y.csv").write_text(path.read_text().replace(old, new))
        with pytest.raises(UserError, match=r"y\.csv:5: not an annotation"):
            read_actions(str(tmp_path / "y.csv"))
    write_annotations(path, [*ROWS[:3], ("P01_01", 9.5, 9.75, 0, -1)])
    with pytest.raises(UserError, match=r"x\.csv:5: .* a class is negative"):
        read_actions(str(path))
