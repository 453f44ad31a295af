"""Folders of the benchmarks of intuitive physics; which videos are compared."""

import shutil

import numpy as np
import pytest
from damaged_files import damage, halve
from physics_files import (
    SIZE,
    quadruplet,
    render_pairs,
    write_intphys,
    write_intphys2,
)
from PIL import Image
from video_files import moving_frames, write_video

from vjepa_jax.base.errors import UserError
from vjepa_jax.evals.physics.videos import (
    Group,
    Video,
    matched_pairs,
    open_groups,
    read_group,
    shared_frames,
)


@pytest.fixture
def intphys(tmp_path, rng):
    # Aa, Ab, Ba, Bb of which Aa and Bb are possible.
    scenes = {
        "O1/01": quadruplet(rng),
        "O1/02": quadruplet(rng),
        "O3/07": quadruplet(rng),
    }
    write_intphys(tmp_path, scenes)
    return tmp_path, scenes


def test_intphys_is_matched_by_the_first_frame_that_differs(intphys):
    root, scenes = intphys
    groups = open_groups("intphys", str(root))
    assert [g.property for g in groups] == ["O1", "O1", "O3"]
    for group, videos in zip(groups, scenes.values(), strict=True):
        assert [v.is_possible for v in group.videos] == [True, False, False, True]
        read = read_group(group, size=SIZE, frame_step=1)
        for found, wanted in zip(read, videos, strict=True):
            np.testing.assert_array_equal(found, wanted)
        assert matched_pairs(group, read) == [(0, 1), (3, 2)]


def test_matching_does_not_depend_on_the_order(tmp_path, rng):
    videos = quadruplet(rng)
    order = rng.permutation(4)
    labels = np.array([True, False, False, True])[order]
    write_intphys(
        tmp_path, {"O2/1": [videos[i] for i in order]}, labels=labels.tolist()
    )
    (group,) = open_groups("intphys", str(tmp_path))
    found = matched_pairs(group, read_group(group, size=SIZE, frame_step=1))
    assert {tuple(order[list(pair)]) for pair in found} == {(0, 1), (3, 2)}


def test_intphys_keeps_whole_steps_of_its_frames(intphys):
    root, scenes = intphys
    group = open_groups("intphys", str(root))[0]
    # 11 of 12 frames count, of which 5 steps of 2 are whole.
    read = read_group(group, size=SIZE, frame_step=2, max_frames=11)
    np.testing.assert_array_equal(read[0], scenes["O1/01"][0][:10:2])


def test_the_test_set_of_intphys_has_no_labels(tmp_path, rng):
    write_intphys(tmp_path, {"O1/0001": quadruplet(rng)}, labels=[None] * 4)
    (group,) = open_groups("intphys", str(tmp_path))
    assert [v.is_possible for v in group.videos] == [None] * 4


def test_labels_of_some_videos_alone_are_refused(tmp_path, rng):
    write_intphys(tmp_path, {"O1/01": quadruplet(rng), "O1/02": quadruplet(rng)})
    for number in (1, 2):  # a pair is left, which is no quadruplet with labels
        (tmp_path / "O1" / "02" / str(number) / "status.json").unlink()
    with pytest.raises(
        UserError, match=r"2 of the 8 videos .* first is .*/O1/02/1/scene"
    ):
        open_groups("intphys", str(tmp_path))


def test_an_incomplete_quadruplet_is_named(tmp_path, rng):
    write_intphys(tmp_path, {"O1/03": quadruplet(rng)[:3]}, labels=[True, False, False])
    with pytest.raises(UserError, match=r"O1/03 does not hold a quadruplet"):
        open_groups("intphys", str(tmp_path))


def test_grasp_pairs_scenes_of_one_name_and_keeps_every_step(tmp_path):
    lengths = {"a.mp4": 9, "b.mp4": 12}
    for i, kind in enumerate(("P", "IP")):
        for name in ("Gravity", "Collision"):
            folder = tmp_path / f"{kind}_{name}"
            folder.mkdir()
            for j, (scene, length) in enumerate(lengths.items()):
                frames = moving_frames(length, SIZE, 2 * SIZE, seed=2 * i + j)
                write_video(folder / scene, frames)
    groups = open_groups("grasp", str(tmp_path))
    assert [g.property for g in groups] == ["Collision"] * 2 + ["Gravity"] * 2
    assert groups[1].videos == (
        Video(tmp_path / "P_Collision" / "b.mp4", True),
        Video(tmp_path / "IP_Collision" / "b.mp4", False),
    )
    for group, length in zip(groups[:2], lengths.values(), strict=True):
        every = read_group(group, size=SIZE, frame_step=1)
        fourth = read_group(group, size=SIZE, frame_step=4)
        for all_of_it, some in zip(every, fourth, strict=True):
            assert all_of_it.shape == (length, SIZE, SIZE, 3)
            np.testing.assert_array_equal(some, all_of_it[::4])
    (tmp_path / "IP_Gravity" / "b.mp4").unlink()
    with pytest.raises(UserError, match=r"b\.mp4 is in only one of"):
        open_groups("grasp", str(tmp_path))


def test_a_frame_is_resized_as_a_whole(tmp_path):
    """Left black, right white, twice as wide as high: nothing is cropped."""
    pixels = np.zeros((4, SIZE, 2 * SIZE, 3), np.uint8)
    pixels[:, :, : SIZE // 2] = 255
    write_video(tmp_path / "v.mp4", pixels)
    video = Video(tmp_path / "v.mp4", True)
    (found,) = read_group(Group("x", (video,)), size=SIZE, frame_step=1)
    bright = (found > 128).mean((0, 1, 3))
    np.testing.assert_array_equal(bright, np.arange(SIZE) < SIZE // 4)


SCENES = {"0": "solidity", "124": "immutability_texture", "124_0": "permanence"}


def test_intphys2_pairs_videos_of_a_scene_and_number(tmp_path):
    decoded = write_intphys2(tmp_path / "Main", SCENES)
    groups = open_groups("intphys2", str(tmp_path / "Main"))
    # In the order of the conditions; variants of a condition count as it.
    wanted = ["permanence"] * 2 + ["immutability"] * 2 + ["solidity"] * 2
    assert [g.property for g in groups] == wanted
    scenes = ["124_0", "124_0", "124", "124", "0", "0"]
    for number, (group, scene) in enumerate(zip(groups, scenes, strict=True)):
        names = [f"{scene}_{2 * (number % 2) + i}.mp4" for i in (0, 1)]
        assert [v.path.name for v in group.videos] == names
        assert [v.is_possible for v in group.videos] == [True, False]
        read = read_group(group, size=SIZE, frame_step=5)
        for name, frames in zip(names, read, strict=True):
            np.testing.assert_array_equal(frames, decoded[name][::5])
        assert matched_pairs(group, read) == [(0, 1)]
    by_difficulty = open_groups("intphys2", str(tmp_path / "Main"), rows="Difficulty")
    assert [g.property for g in by_difficulty] == ["Easy"] * 2 + ["Hard"] * 4


def test_recordings_of_one_scene_are_paired_in_order(tmp_path):
    """The split Debug has three recordings of every video."""
    write_intphys2(tmp_path, {"0": "continuity"})
    path = tmp_path / "metadata.csv"
    header, *rows = path.read_text().splitlines()
    again = [row.replace("0_", "again_", 2) for row in rows]
    path.write_text("\n".join([header, *rows, *again]))
    groups = open_groups("intphys2", str(tmp_path))
    names = [[v.path.stem for v in g.videos] for g in groups]
    assert names == [
        ["0_0", "0_1"],
        ["again_0", "again_1"],
        ["0_2", "0_3"],
        ["again_2", "again_3"],
    ]


def test_a_split_without_labels_lists_its_videos(tmp_path):
    write_intphys2(tmp_path, {"0": "solidity"})
    path = tmp_path / "metadata.csv"
    rows = [line.split(",")[2] for line in path.read_text().splitlines()]
    for content in ("\n".join(rows), None):
        path.write_text(content) if content else path.unlink()
        groups = open_groups("intphys2", str(tmp_path))
        videos = [video for group in groups for video in group.videos]
        assert [v.path.stem for v in videos] == ["0_0", "0_1", "0_2", "0_3"]
        assert {v.is_possible for v in videos} == {None}


def test_metadata_of_intphys2_that_is_damaged_is_named(tmp_path):
    write_intphys2(tmp_path / "Main", {"7": "solidity"})
    path = tmp_path / "Main" / "metadata.csv"
    good = path.read_text()
    with pytest.raises(UserError, match="holds several splits: give the folder of M"):
        open_groups("intphys2", str(tmp_path))
    for old, new, message in (
        ("2_Impossible", "2_Possible", "scene 7 has 2 videos of the type 2_Possible"),
        ("2_Impossible", "Impossible", r"metadata\.csv:5: not the metadata"),
        ("2_Impossible", "2_Perhaps", "perhaps"),
        ("solidity", "liquidity", "unknown condition 'liquidity'"),
        ("SceneIndex", "Scene", "SceneIndex"),
    ):
        path.write_text(good.replace(old, new))
        with pytest.raises(UserError, match=message):
            open_groups("intphys2", str(tmp_path / "Main"))
    path.write_text(good)
    with pytest.raises(UserError, match="'Colour'"):
        open_groups("intphys2", str(tmp_path / "Main"), rows="Colour")


def test_frames_of_a_folder_are_read_by_their_numbers(tmp_path):
    pixels = moving_frames(12, SIZE, SIZE)
    for i, frame in enumerate(pixels):
        Image.fromarray(frame).save(tmp_path / f"scene_{i}.png")
    (tmp_path / "Thumbs.db").write_bytes(b"of a file manager")
    (tmp_path / "._scene_0.png").write_bytes(b"of a file manager")
    group = Group("x", (Video(tmp_path, True),))
    (read,) = read_group(group, size=SIZE, frame_step=1)
    np.testing.assert_array_equal(read, pixels)


HEADER = (
    "vid1_path,vid1_label,vid1_end_priming_2,vid2_path,vid2_label,vid2_end_priming_2\n"
)


def test_inflevel_leaves_the_priming_out_and_aligns_the_ends(tmp_path):
    (tmp_path / "lists").mkdir()
    (tmp_path / "gravity").mkdir()
    frames = {}
    for name, length in (("a", 14), ("b", 17)):
        pixels = moving_frames(length, SIZE, SIZE, seed=length)
        path = tmp_path / "gravity" / f"{name}.mp4"
        write_video(path, pixels)
        (whole,) = read_group(Group("x", (Video(path, True),)), size=SIZE, frame_step=1)
        frames[name] = whole
    rows = "gravity/a.mp4,impossible,3,gravity/b.mp4,possible,4\n"
    (tmp_path / "lists" / "gravity.csv").write_text(HEADER + rows, encoding="utf-16")
    (group,) = open_groups("inflevel", str(tmp_path), str(tmp_path / "lists"))
    assert [v.is_possible for v in group.videos] == [False, True]
    one, other = read_group(group, size=SIZE, frame_step=3)
    # After the priming, 10 frames of the first and 12 of the second are left.
    np.testing.assert_array_equal(one, frames["a"][4::3])
    np.testing.assert_array_equal(other, frames["b"][7::3])
    assert matched_pairs(group, [one, other]) == [(1, 0)]
    (tmp_path / "lists" / "gravity.csv").write_text(
        HEADER + rows.replace("impossible", "possible")
    )
    with pytest.raises(UserError, match=r"a\.mp4 and gravity/b\.mp4: exactly one"):
        open_groups("inflevel", str(tmp_path), str(tmp_path / "lists"))
    (tmp_path / "lists" / "gravity.csv").write_text("path,label\na,1\n")
    with pytest.raises(UserError, match=r"gravity\.csv: not a list of InfLevel"):
        open_groups("inflevel", str(tmp_path), str(tmp_path / "lists"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    render_pairs(root)
    return root


def test_pairs_of_the_world(pairs):
    groups = open_groups("world", str(pairs))
    truth = np.load(pairs / "physics.npz")
    assert [g.property for g in groups] == truth["property"][::2].tolist()
    for group, onset in zip(groups, truth["onset"][::2], strict=True):
        assert [v.is_possible for v in group.videos] == [True, False]
        read = read_group(group, size=SIZE, frame_step=1)
        # At this size the codec may swallow the first trace of a difference.
        assert onset <= shared_frames(*read) <= onset + 2
        assert matched_pairs(group, read) == [(0, 1)]


def test_a_damaged_truth_of_the_world_is_named(pairs, tmp_path):
    world = shutil.copytree(pairs, tmp_path / "world")
    damage(world / "physics.npz", halve)
    with pytest.raises(UserError, match=r"physics\.npz is missing or damaged .*render"):
        open_groups("world", str(world))
    shutil.copy(pairs / "physics.npz", world)
    lines = (world / "physics.csv").read_text().splitlines(keepends=True)
    (world / "physics.csv").write_text("".join(lines[:-1]))
    with pytest.raises(UserError, match=r"physics\.npz describes \d+ videos, the list"):
        open_groups("world", str(world))


def test_shared_frames():
    video = np.arange(5 * 12, dtype=np.uint8).reshape(5, 2, 2, 3)
    other = video.copy()
    other[3, 1, 0, 2] += 1
    assert shared_frames(video, video) == 5
    assert shared_frames(video, video[:2]) == 2
    assert shared_frames(video, other) == 3
    assert shared_frames(other[3:], video[3:]) == 0


def test_what_is_not_there_is_named(tmp_path):
    for dataset in ("intphys", "intphys2", "grasp", "inflevel"):
        with pytest.raises(UserError, match=f"no videos of {dataset}"):
            open_groups(dataset, str(tmp_path))
    with pytest.raises(UserError, match=r"physics\.npz is missing: render a world"):
        open_groups("world", str(tmp_path))
    with pytest.raises(UserError, match="'astrology': known: world, intphys"):
        open_groups("astrology", str(tmp_path))
    with pytest.raises(UserError, match=r"config\.path=.* is not a folder"):
        open_groups("world", str(tmp_path / "nowhere"))
    group = Group("x", (Video(tmp_path / "gone.mp4", True),))
    with pytest.raises(UserError, match=r"gone\.mp4: missing"):
        read_group(group, size=SIZE, frame_step=1)
