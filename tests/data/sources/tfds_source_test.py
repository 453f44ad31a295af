import io
import json
import pickle
import subprocess
import sys
import types

import av
import numpy as np
import pytest
from video_files import moving_frames, write_video

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources.open import open_source

tfds = pytest.importorskip(
    "tensorflow_datasets", reason="TFDS is missing: pip install 'vjepa_jax[tfds]'"
)
features = tfds.features
CLASSES = {"label": features.ClassLabel(names=["a", "b", "c"])}


def prepare(name, kinds, examples, folder):
    """Write a dataset of one split, train, as ArrayRecord files."""

    def body(namespace):
        namespace.update(
            __module__=__name__,
            VERSION=tfds.core.Version("1.0.0"),
            _info=lambda self: tfds.core.DatasetInfo(
                builder=self, features=features.FeaturesDict(kinds)
            ),
            _split_generators=lambda self, _: {"train": self._generate_examples()},
            _generate_examples=lambda self: (
                (str(i), example) for i, example in enumerate(examples)
            ),
        )

    camel_case = "".join(part.title() for part in name.split("_"))
    builder = types.new_class(
        camel_case,
        (tfds.core.GeneratorBasedBuilder,),
        {"skip_registration": True},
        body,
    )
    builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return f"tfds:{name}:train@{folder}"


def jpeg(pixels):
    content = io.BytesIO()
    with av.open(content, "w", format="image2pipe") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = "yuvj444p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())
    return content.getvalue()


def videos(folder):
    paths = [
        write_video(folder / f"{i}.mp4", moving_frames(4, seed=i)) for i in range(3)
    ]
    contents = []
    for path in paths:
        with open(path, "rb") as file:
            contents.append(file.read())
    return contents


def by_label(source):
    """Return records in the order of their labels: TFDS shuffles what it stores."""
    return sorted(source, key=lambda record: record.label)


@pytest.mark.parametrize(
    "kind", [features.Text(), features.Scalar(np.object_)], ids=["text", "scalar"]
)
def test_stored_files_come_back_whole(tmp_path, kind):
    contents = videos(tmp_path)
    examples = [{"video": video, "label": i} for i, video in enumerate(contents)]
    path = prepare("files", {"video": kind, **CLASSES}, examples, tmp_path)
    source = open_source(path)
    assert [record.media for record in by_label(source)] == contents
    assert sorted(source.labels) == [0, 1, 2] and source.labels.dtype == np.int64
    assert source.class_names == ["a", "b", "c"] and not source.unlabelled
    assert [record.label for record in source] == source.labels.tolist()
    assert source[2].path == source.path_of(-1) == f"{path}#2"
    copy = pickle.loads(pickle.dumps(source))
    assert [record.media for record in copy] == [record.media for record in source]
    with pytest.raises(IndexError):
        source[3]


def test_frames_and_images(tmp_path):
    clips = [moving_frames(i + 2, 32, 48, seed=i) for i in range(3)]
    examples = [
        {
            "frames": [io.BytesIO(jpeg(frame)) for frame in clip],
            "fps": 7.5 * (i + 1),
            "caption": "text that is no video",
            "label": i,
        }
        for i, clip in enumerate(clips)
    ]
    kinds = {
        "frames": features.Sequence(features.Image(encoding_format="jpeg")),
        "fps": features.Scalar(np.float32),
        "caption": features.Text(),
        **CLASSES,
    }
    source = open_source(prepare("frame_clips", kinds, examples, tmp_path))
    for i, (record, clip) in enumerate(zip(by_label(source), clips, strict=True)):
        assert record.media.shape == clip.shape and record.media.dtype == np.uint8
        # Lossy, yet far nearer than another clip of the same kind.
        assert np.abs(record.media.astype(int) - clip).mean() < 4
        assert record.fps == 7.5 * (i + 1)

    images = [jpeg(clip[0]) for clip in clips]
    examples = [
        {"image": io.BytesIO(image), "class": i} for i, image in enumerate(images)
    ]
    kinds = {"image": features.Image(), "class": CLASSES["label"]}
    source = open_source(prepare("stills", kinds, examples, tmp_path))
    assert [record.media for record in by_label(source)] == images


def test_splits_and_versions(tmp_path):
    examples = [{"video": b"v%d" % i} for i in range(10)]
    path = prepare("bare", {"video": features.Text()}, examples, tmp_path)
    whole = open_source(path)
    assert whole.labels.tolist() == [0] * 10
    part = open_source(path.replace("train", "train[:30%]"))
    assert [r.media for r in part] == [r.media for r in whole][:3]
    versioned = open_source(path.replace("bare:", "bare:1.0.0:"))
    assert versioned.digest() == whole.digest() != part.digest()


def test_what_cannot_be_chosen_is_listed(tmp_path):
    example = {"text": "t", "left": b"", "right": b""}
    path = prepare("no_media", {"text": features.Text()}, [{"text": "t"}], tmp_path)
    with pytest.raises(UserError, match=r"no feature to take .*\{text: Text\}"):
        open_source(path)
    frame = jpeg(moving_frames(1)[0])
    kinds = {"left": features.Image(), "right": features.Image()}
    example = {key: io.BytesIO(frame) for key in kinds}
    path = prepare("two_media", kinds, [example], tmp_path)
    with pytest.raises(UserError, match=r"more than one feature .*left: Image"):
        open_source(path)
    kinds = {"video": features.Text(), "noun": CLASSES["label"]}
    kinds["verb"] = features.ClassLabel(num_classes=2)
    example = {"video": b"v", "noun": 0, "verb": 1}
    path = prepare("two_labels", kinds, [example], tmp_path)
    with pytest.raises(UserError, match="several labels, none of them named label"):
        open_source(path)


def test_video_features_are_refused_with_the_fix(tmp_path):
    kinds = {"video": features.Sequence(features.Image(encoding_format="jpeg"))}
    example = {"video": [io.BytesIO(jpeg(moving_frames(1)[0]))]}
    path = prepare("typed", kinds, [example], tmp_path)
    stored = tmp_path / "typed" / "1.0.0" / "features.json"
    content = json.loads(stored.read_text())
    content["featuresDict"]["features"]["video"] = {
        "pythonClassName": "tensorflow_datasets.core.features.video_feature.Video",
        "video": {
            "shape": {"dimensions": ["-1", "48", "48", "3"]},
            "encodingFormat": "jpeg",
        },
    }
    stored.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"store frames as Sequence\(Image\)"):
        open_source(path)


@pytest.mark.parametrize(
    "path, message",
    [
        ("tfds:name", "should be tfds:NAME:SPLIT"),
        ("tfds:name:", "should be tfds:NAME:SPLIT"),
        ("tfds:no_such_name:train@{}", "Dataset no_such_name not found"),
        ("tfds:there:test@{}", "Unknown split 'test'"),
    ],
)
def test_wrong_names_are_one_line(tmp_path, path, message):
    prepare("there", {"video": features.Text()}, [{"video": b"v"}], tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_source(path.format(tmp_path))
    assert "\n" not in str(caught.value)


def test_tensorflow_is_not_imported(tmp_path):
    path = prepare("there", {"video": features.Text()}, [{"video": b"v"}], tmp_path)
    code = f"""
import sys
from vjepa_jax.data.sources.open import open_source
assert open_source({path!r})[0].media == b"v"
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)
