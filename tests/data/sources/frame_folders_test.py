"""Folders of extracted frames, and images that lie beside videos, are pointed out."""

import itertools
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st
from list_files import make_files, records, write_list

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources import frame_folders
from vjepa_jax.data.sources.open import open_source


def names(pattern, numbers):
    return [pattern.format(number) for number in numbers]


@pytest.mark.parametrize(
    "pattern", ["v1/img_{:05}.jpg", "{:d}.png", "c/v 1/frame{:06}.JPG", "a/1_{}.webp"]
)
@pytest.mark.parametrize(
    "numbers", [range(1, 4), range(98, 150), range(0, 60, 5), [0, 1, 2, 4, 5, 6, 7]]
)
def test_rows_of_frames_are_found_in_order(pattern, numbers):
    frames = names(pattern, numbers)
    assert frame_folders.find([*reversed(frames), "c/cover.jpg"]) == [frames]


@pytest.mark.parametrize(
    "images",
    [
        [],
        ["a/1.jpg", "a/2.jpg"],
        ["a/1.jpg", "b/2.jpg", "c/3.jpg"],
        ["a/cat.jpg", "a/dog.jpg", "a/owl.jpg"],
        names("n01440764/n01440764_{}.JPEG", [10026, 10027, 10029, 10040, 10042]),
        ["a/x1.jpg", "a/y2.jpg", "a/z3.jpg"],
    ],
)
def test_other_images_are_no_frames(images):
    assert not frame_folders.find(images)


def test_rows_that_share_a_folder_are_several():
    kinds = ("img", "flow_x", "flow_y")
    rows = [names(f"v/{kind}_{{:05}}.jpg", range(1, 6)) for kind in kinds]
    assert frame_folders.find(itertools.chain(*rows)) == rows


@given(st.lists(st.text(max_size=12)))
def test_any_names_can_be_asked_for(images):
    for group in frame_folders.find(images):
        assert set(group) <= set(images)
        assert "ffmpeg" in frame_folders.command("folder", group)


@pytest.mark.parametrize(
    "numbered, pattern",
    [
        (names("img_{:05}.jpg", [1, 2, 4]), "-pattern_type glob -i '/d/v 1/img_*.jpg'"),
        (names("{}.png", range(9, 12)), "-start_number 9 -i '/d/v 1/%d.png'"),
        (["a.png", "b.png"], "-pattern_type glob -i '/d/v 1/*.png'"),
    ],
)
def test_the_command_keeps_the_order(numbered, pattern):
    command = frame_folders.command("/d/v 1/", numbered)
    assert pattern in command and command.endswith(" '/d/v 1.mp4'")


@pytest.mark.parametrize("columns", ["{} 0", "{} 120 0", "{}\t0", '"{}" 1'])
def test_lists_of_frame_folders_say_what_to_do(tmp_path, columns):
    make_files(tmp_path, *names("video_0001/img_{:05}.jpg", range(1, 9)))
    path = write_list(tmp_path, columns.format("video_0001") + "\n")
    with pytest.raises(UserError, match="a folder of 8 images: extracted frames") as e:
        open_source(path)
    assert f"ffmpeg -framerate FPS -pattern_type glob -i '{tmp_path}/video" in str(
        e.value
    )


def test_lists_of_other_folders_say_what_to_do(tmp_path):
    make_files(tmp_path, "cat/a.mp4")
    with pytest.raises(UserError, match=r"cat', which is a folder: give the folder as"):
        open_source(write_list(tmp_path, "cat 0\n"))


def warnings_of(caplog, path):
    with caplog.at_level(logging.WARNING):
        open_source(str(path))
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("folder", ["v1", "class/v1", "."])
def test_folders_of_frames_are_pointed_out(tmp_path, caplog, folder):
    make_files(tmp_path, *names(f"{folder}/img_{{:05}}.jpg", range(1, 9)))
    make_files(tmp_path, *names("v2/img_{:05}.jpg", range(1, 4)))
    (message,) = warnings_of(caplog, tmp_path)
    assert "numbered in a row, like the frames of a video (one of 2" in message
    assert "ffmpeg -framerate FPS" in message


@pytest.mark.parametrize("image", ["cover.jpg", "cat/cover.png", "thumbs/a.webp"])
def test_images_beside_videos_are_pointed_out(tmp_path, caplog, image):
    make_files(tmp_path, "cat/a.mp4", "dog/a.mp4", image)
    (message,) = warnings_of(caplog, tmp_path)
    assert f"1 images beside 2 videos, such as {image!r}" in message
    assert len(records(open_source(str(tmp_path)))) == 3


@pytest.mark.parametrize("suffix", [".mp4", ".jpg"])
def test_ordinary_folders_are_not(tmp_path, caplog, suffix):
    make_files(tmp_path, *names(f"cat/{{}}{suffix}", [3, 17, 40]), f"dog/rex{suffix}")
    assert not warnings_of(caplog, tmp_path)
