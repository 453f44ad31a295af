"""Surprise of users' videos: the ranking, the files, bad videos, the command."""

import dataclasses
import json
import os
import subprocess
import sys

import av
import numpy as np
import pytest
from surprise_setup import make_config, make_model, write_checkpoint
from video_files import decode_plainly, moving_frames, write_video

from vjepa_jax import surprise as command
from vjepa_jax.base.errors import UserError
from vjepa_jax.data.clips.frame_stream import FrameStream
from vjepa_jax.data.sources.open import open_videos
from vjepa_jax.evals.physics.surprise import Protocol, SurpriseMeter
from vjepa_jax.report.surprise_pictures import FrameMaps, draw_curves
from vjepa_jax.report.video_surprise import Outputs, write_surprise

SIZE = 16
STREAM = FrameStream(SIZE, frame_step=1)


@pytest.fixture(scope="module")
def meter():
    return SurpriseMeter(make_model(), Protocol(8, 2, (4,)))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Return a folder of videos: two good ones of one name, and bad ones."""
    root = tmp_path_factory.mktemp("my videos")
    for name, length, seed in (("a", 12, 1), ("b", 21, 2)):
        (root / name).mkdir()
        write_video(
            root / name / "my clip.mp4",
            moving_frames(length, 24, 40, seed=seed),
            fps=10,
        )
    write_video(root / "short.mp4", moving_frames(5, SIZE, SIZE))
    (root / "broken.mp4").write_bytes(b"\0" * 100)
    (root / "notes.txt").write_text("no video")
    return root


@pytest.fixture(scope="module")
def written(meter, videos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out") / "surprise"
    outputs = Outputs(folder, ("plot", "films", "maps"), "max")
    results = write_surprise(meter, open_videos(str(videos)), STREAM, outputs)
    return folder, results


def test_numbers_are_those_of_the_meter(meter, videos, written):
    folder, results = written
    ranking = json.loads((folder / "ranking.json").read_text())
    lines = (folder / "windows.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    by_path = {str(videos / n / "my clip.mp4"): n for n in "ab"}
    assert {v["video"] for v in ranking["videos"]} == set(by_path)
    for video in ranking["videos"]:
        frames = np.stack([x for _, x in STREAM.read(record_of(video["video"]))])
        wanted = meter(frames, fps=10)
        mine = [row for row in rows if row["video"] == video["video"]]
        found = np.array([row["surprise"] for row in mine])
        np.testing.assert_allclose(found, wanted.surprise, rtol=1e-5)
        times = np.array([[row[k] for k in ("start", "time", "end")] for row in mine])
        starts = np.arange(len(found)) * 0.2
        np.testing.assert_allclose(times, starts[:, None] + [0.0, 0.55, 0.7], atol=1e-3)
        assert video["mean"] == pytest.approx(found.mean(), rel=1e-6)
        assert video["max"] == pytest.approx(found.max(), rel=1e-6)
        top = mine[int(found.argmax())]["time"]
        assert video["time_of_max"] == pytest.approx(top)
        with np.load(folder / "maps" / f"{video['files']}.npz") as arrays:
            np.testing.assert_allclose(arrays["maps"], wanted.maps, rtol=1e-5)
            np.testing.assert_allclose(arrays["surprise"], found, rtol=1e-6)
            np.testing.assert_allclose(arrays["times"], wanted.times, atol=1e-3)
    tops = [v["max"] for v in ranking["videos"]]
    assert tops == sorted(tops, reverse=True)
    assert results.table().splitlines()[1].split()[0] == "1"
    assert len(results.table().splitlines()) == 3


def record_of(path):
    return open_videos(path)[0]


def test_bad_videos_are_named_and_skipped(videos, written):
    folder, _ = written
    skipped = json.loads((folder / "ranking.json").read_text())["skipped"]
    assert skipped == {
        str(videos / "broken.mp4"): skipped[str(videos / "broken.mp4")],
        str(videos / "short.mp4"): "too short (5 of the 8 frames of a window)",
    }
    assert skipped[str(videos / "broken.mp4")].startswith("not_a_video")


def test_films_play_in_browsers_and_take_as_long_as_the_videos(written):
    folder, results = written
    names = sorted(file.name for file in (folder / "films").iterdir())
    assert names == ["my_clip.mp4", "my_clip_2.mp4"]
    for video in results.ranked:
        with av.open(str(folder / "films" / f"{video.name}.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec.canonical_name, stream.pix_fmt) == ("h264", "yuv420p")
            assert stream.width % 2 == stream.height % 2 == 0
            assert float(stream.average_rate) == pytest.approx(10, rel=0.01)
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        source = decode_plainly(video.path)
        assert len(frames) == len(source)
        # Two panels of the video's shape, one beside the other.
        width = (frames[0].shape[1] - 4) // 2
        assert width / 320 == pytest.approx(40 / 24, rel=0.01)
        # The first frames are not predicted: grey. The later ones are in colours.
        for number, is_coloured in ((0, False), (3, False), (4, True), (8, True)):
            right = frames[number][:320, width + 8 :].astype(int)
            assert (np.ptp(right, axis=2).mean() > 10) == is_coloured
    assert (folder / "surprise.png").read_bytes().startswith(b"\x89PNG")
    assert not [file for file in folder.iterdir() if file.name.startswith(".")]


def test_only_what_is_asked_for_is_written(meter, videos, tmp_path):
    outputs = Outputs(tmp_path / "out", (), max_films=1)
    path = str(videos / "a" / "my clip.mp4")
    write_surprise(meter, open_videos(path), STREAM, outputs)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"ranking.json", "windows.jsonl"}
    # Again, with a film; other files in the folder stay.
    (tmp_path / "out" / "mine.txt").touch()
    outputs = dataclasses.replace(outputs, kinds=("films",))
    write_surprise(meter, open_videos(str(videos)), STREAM, outputs)
    assert len(list((tmp_path / "out" / "films").iterdir())) == 1
    assert (tmp_path / "out" / "mine.txt").exists()
    with pytest.raises(UserError, match="--write='film' is not known"):
        Outputs(tmp_path, ("film",))


def test_nothing_readable_is_an_error(meter, videos, tmp_path):
    path = f"{videos / 'broken.mp4'}, {videos / 'short.mp4'}"
    with pytest.raises(
        UserError, match=r"none of the 2 videos can be measured; .*broken\.mp4: not_a_v"
    ):
        write_surprise(meter, open_videos(path), STREAM, Outputs(tmp_path / "out"))
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"file cannot be written: File exists"):
        write_surprise(meter, open_videos(path), STREAM, Outputs(file))


def test_a_frame_has_the_mean_of_the_windows_that_predict_it(rng):
    for _ in range(20):
        tubelet = int(rng.integers(1, 4))
        steps, context = (int(n) for n in rng.integers(1, 4, 2))
        length = tubelet * (steps + context)
        stride, count = int(rng.integers(1, length + 1)), int(rng.integers(1, 6))
        maps = rng.random((count, steps, 2, 3), np.float32)
        looked_up = FrameMaps(maps, stride, context * tubelet, tubelet)
        found = {}
        for window in range(count):
            for step in range(steps):
                for k in range(tubelet):
                    frame = window * stride + (context + step) * tubelet + k
                    found.setdefault(frame, []).append(maps[window, step])
        for frame in range((count - 1) * stride + length + 3):
            if frame in found:
                wanted = np.mean(found[frame], axis=0)
                np.testing.assert_allclose(looked_up.at(frame), wanted, rtol=1e-5)
            else:
                assert looked_up.at(frame) is None


def test_many_long_curves_are_drawn(tmp_path, rng):
    times = np.arange(5000) / 4
    curves = {f"video {i} $x_": (times, rng.random(5000)) for i in range(12)}
    draw_curves(curves, tmp_path / "many.png")
    draw_curves({"one": (times[:1], np.ones(1))}, tmp_path / "one.png")
    for name in ("many", "one"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


# -------------------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("fps", "frame_step", "wanted"),
    [(0, 0, (0, 4.0)), (7.5, 0, (0, 7.5)), (0, 3, (3, 0))],
)
def test_frames_are_as_in_training_unless_given(fps, frame_step, wanted):
    data = make_config().data
    data.update(fps=0.0, frame_step=0, duration_secs=2.0, num_frames=8)
    stream = command.make_stream(data, SIZE, fps, frame_step, "central")
    assert (stream.frame_step, stream.fps) == wanted
    assert stream.crop(20, 40) == (0, 10, 20, 20)


def test_frames_cannot_be_given_twice():
    with pytest.raises(UserError, match="either --fps or --frame_step"):
        command.make_stream(make_config().data, SIZE, 2.0, 2, "whole")


def test_results_do_not_mix_with_the_videos(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    folder = command.output_folder("", str(tmp_path / "run"), str(videos))
    assert folder == tmp_path / "run" / "surprise"
    for output in (videos, videos / "out"):
        with pytest.raises(UserError, match="give another --output"):
            command.output_folder(str(output), "run", f"x.mp4,{videos}")
    with pytest.raises(UserError, match="gs://b/run is remote: give a local --output"):
        command.output_folder("", "gs://b/run", str(videos))


def test_sources_are_videos_folders_lists_and_several(videos, tmp_path):
    (tmp_path / "list.csv").write_text(f'"{videos / "a" / "my clip.mp4"}" 3\n')
    copy = tmp_path / "no suffix, but a comma"
    copy.write_bytes((videos / "a" / "my clip.mp4").read_bytes())
    for path, count in (
        (copy, 1),
        (videos, 4),
        (tmp_path / "list.csv", 1),
        (f"{videos}, {tmp_path / 'list.csv'},{videos / 'short.mp4'}", 6),
    ):
        source = command.open_source(str(path))
        assert len(source) == count
        assert os.path.exists(source.path_of(count - 1))
    for path, message in (
        (f"{videos},,x", r"^--video '.*,,x' has nothing between two commas"),
        (tmp_path / "gone.mp4", r"^--video '.*gone\.mp4' does not exist"),
        (videos / "notes.txt", r"notes\.txt:1: expected 'path label'"),
    ):
        with pytest.raises(UserError, match=message):
            command.open_source(str(path))


def test_the_command(meter, videos, tmp_path):
    write_checkpoint(tmp_path / "run", meter.model)
    command_line = [sys.executable, "-m", "vjepa_jax.surprise"]
    command_line += [f"--workdir={tmp_path / 'run'}", f"--video={videos}"]
    command_line += ["--frame_step=2", "--num_frames=4", "--write=plot"]
    done = subprocess.run(
        command_line,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    header, *rows = done.stdout.splitlines()
    assert header.split()[:3] == ["rank", "mean", "max"]
    assert {row.split("  ")[-1] for row in rows} == {
        str(videos / name / "my clip.mp4") for name in "ab"
    }
    assert f"skipped {videos / 'short.mp4'}: too short (3 of the 4" in done.stderr
    assert "2 of 4 videos were skipped" in done.stderr
    folder = tmp_path / "run" / "surprise"
    assert {f.name for f in folder.iterdir()} == {
        "ranking.json",
        "windows.jsonl",
        "surprise.png",
    }
    settings = json.loads((folder / "ranking.json").read_text())["settings"]
    assert settings["frame_step"] == 2 and settings["context_frames"] == 2
