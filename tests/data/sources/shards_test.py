import io
import json
import multiprocessing
import os
import pickle
import random

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.sources import shards
from vjepa_jax.data.sources.open import open_source

NAME = "shard-00001-of-00003"


def write_folder(folder, counts=(3, 4, 2), settings=None):
    """Write shards of made-up bytes as `prepare` does; return the records."""
    rng, records, described = random.Random(), [], []
    for number, count in enumerate(counts):
        written = []
        for position in range(count):
            written.append(
                shards.VideoRecord(
                    video=rng.randbytes(rng.randrange(1, 60000)),
                    label=rng.randrange(10),
                    id=f"class é/{number}_{position}.mp4",
                    path=f"/videos/class é/{number}_{position}.mp4",
                    fps=29.97,
                    num_frames=rng.randrange(1, 300),
                    width=320,
                    height=240,
                )
            )
        path = folder / (shards.shard_name(number, len(counts)) + shards.SUFFIX)
        shards.write_shard(str(path), written)
        described.append(
            {
                "name": path.stem,
                "num_records": count,
                "num_bytes": path.stat().st_size,
                "sha256": shards.checksum(str(path)),
            }
        )
        records += written
    index = [(record.id, record.label, record.num_frames) for record in records]
    manifest = {
        "format": shards.FORMAT,
        "settings": settings or {"short_side": 320},
        "index": shards.write_index(str(folder), index),
        "shards": described,
    }
    (folder / shards.MANIFEST).write_text(json.dumps(manifest))
    return records


def check_records(source, written):
    order = list(range(len(written)))
    random.shuffle(order)
    for index in order:
        record = source[index]
        assert record.media == written[index].video
        assert record.label == written[index].label
        assert record.path == source.path_of(index)


def test_records_come_back_in_any_order(tmp_path):
    written = write_folder(tmp_path)
    source = open_source(str(tmp_path))
    assert isinstance(source, shards.ShardSource)
    check_records(source, written)
    assert [source.read(i) for i in range(len(source))] == written
    np.testing.assert_array_equal(source.labels, [r.label for r in written])
    np.testing.assert_array_equal(source.num_frames, [r.num_frames for r in written])
    assert source[-1] == source[len(source) - 1]
    with pytest.raises(IndexError):
        source[len(source)]


def _read_in_a_process(source, results):
    results.put([source[i].media for i in range(len(source))])


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_sources_go_to_other_processes(tmp_path, method):
    written = write_folder(tmp_path)
    source = shards.ShardSource(str(tmp_path))
    check_records(source, written)  # opens files that the copy must not share
    assert len(pickle.dumps(source)) < 3000
    check_records(pickle.loads(pickle.dumps(source)), written)
    context = multiprocessing.get_context(method)
    results = context.Queue()
    process = context.Process(target=_read_in_a_process, args=(source, results))
    process.start()
    assert results.get(timeout=60) == [record.video for record in written]
    process.join()


def test_few_files_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_MAX_OPEN_SHARDS", 2)
    written = write_folder(tmp_path, counts=(1,) * 6)
    source = shards.ShardSource(str(tmp_path))
    open_before = len(os.listdir("/proc/self/fd"))
    check_records(source, written)
    assert len(os.listdir("/proc/self/fd")) <= open_before + 2


def test_a_record_is_a_plain_message(tmp_path):
    (record,) = write_folder(tmp_path, counts=(1,))
    fields = msgpack.unpackb(record.pack())
    assert fields["video"] == record.video and fields["id"] == record.id
    assert sorted(fields) == sorted(
        ["video", "label", "id", "path", "fps", "num_frames", "width", "height"]
    )
    # A later version may add keys.
    later = msgpack.packb({**fields, "codec": "h264"})
    assert shards.VideoRecord.unpack(later) == record


@given(
    name=st.binary(min_size=1, max_size=20),
    label=st.integers(-(2**63), 2**63 - 1),
    fps=st.floats(allow_nan=False),
)
def test_records_keep_any_name(name, label, fps):
    name = os.fsdecode(name)
    record = shards.VideoRecord(b"\0", label, name, "/" + name, fps, 1, 2, 2)
    assert shards.VideoRecord.unpack(record.pack()) == record


def test_the_digest_is_of_the_content(tmp_path):
    def digest(name, records, **settings):
        folder = tmp_path / name
        folder.mkdir()
        write_folder(folder, counts=(), settings=settings)
        manifest = json.loads((folder / shards.MANIFEST).read_text())
        manifest["index"] = shards.write_index(str(folder), records)
        manifest["shards"] = []
        return manifest["index"]["digest"], settings

    base = digest("a", [("x", 1, 10), ("y", 2, 20)])
    assert digest("b", [("x", 1, 10), ("y", 2, 20)]) == base
    others = [
        digest("c", [("y", 2, 20), ("x", 1, 10)]),
        digest("d", [("x", 1, 10), ("y", 3, 20)]),
        digest("e", [("x", 1, 10), ("y", 2, 21)]),
        digest("f", [("xy", 1, 10), ("", 2, 20)]),
    ]
    assert len({base[0], *(other[0] for other in others)}) == 5


def test_moved_shards_keep_their_digest(tmp_path):
    (tmp_path / "a").mkdir()
    write_folder(tmp_path / "a")
    before = shards.ShardSource(str(tmp_path / "a")).digest()
    (tmp_path / "a").rename(tmp_path / "b")
    assert shards.ShardSource(str(tmp_path / "b")).digest() == before
    manifest = json.loads((tmp_path / "b" / shards.MANIFEST).read_text())
    manifest["settings"]["short_side"] = 256
    (tmp_path / "b" / shards.MANIFEST).write_text(json.dumps(manifest))
    assert shards.ShardSource(str(tmp_path / "b")).digest() != before


def remove_shard(folder):
    (folder / (NAME + shards.SUFFIX)).unlink()


def cut_shard(folder):
    with open(folder / (NAME + shards.SUFFIX), "r+b") as file:
        file.truncate(65536)


def remove_index(folder):
    (folder / shards.INDEX).unlink()


def damage_index(folder):
    with open(folder / shards.INDEX, "r+b") as file:
        file.write(b"x")


def remove_manifest(folder):
    (folder / shards.MANIFEST).rename(folder / f"{shards.MANIFEST}.part")


def change_format(folder):
    text = (folder / shards.MANIFEST).read_text()
    later = text.replace(shards.FORMAT, shards.FORMAT[:-1] + "9")
    (folder / shards.MANIFEST).write_text(later)


@pytest.mark.parametrize(
    "damage, message",
    [
        (remove_shard, f"{NAME}.arrayrecord' is missing"),
        (cut_shard, "has 65536 bytes, but .* by the manifest"),
        (remove_index, "index.npz' is missing or damaged"),
        (damage_index, "index.npz' is missing or damaged"),
        (remove_manifest, "are not complete: manifest.json is missing"),
        (change_format, "has the format 'vjepa_jax video shards 9'"),
    ],
)
def test_folders_that_lack_something_are_refused(tmp_path, damage, message):
    write_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(tmp_path))
    assert "\n" not in str(caught.value) and "prepare" in str(caught.value)


def test_damaged_bytes_cost_a_record_and_are_found_by_verify(tmp_path):
    written = write_folder(tmp_path, counts=(1, 1, 1))
    assert shards.verify(str(tmp_path)) == 3
    path = tmp_path / (NAME + shards.SUFFIX)
    content = bytearray(path.read_bytes())
    start = content.index(written[1].video[:16])
    content[start] ^= 1
    path.write_bytes(content)
    source = shards.ShardSource(str(tmp_path))
    with pytest.raises(OSError, match=f"{NAME}.arrayrecord#0"):
        source[1]
    assert source[2].media == written[2].video
    with pytest.raises(UserError, match=f"{NAME}.arrayrecord' is damaged"):
        shards.verify(str(tmp_path))
    content[start] ^= 1
    path.write_bytes(content)
    assert source[1].media == written[1].video  # repaired under an open source


def test_other_folders_with_a_manifest_are_no_shards(tmp_path):
    for content in ("", "[]", "{}", '{"format": 3}', '{"format": "other"}'):
        (tmp_path / shards.MANIFEST).write_text(content)
        assert not shards.is_shard_folder(str(tmp_path))
        with pytest.raises(UserError):
            shards.read_manifest(str(tmp_path))
    assert not shards.is_shard_folder(str(tmp_path / "nowhere"))
    # With a shard beside it, it is a damaged one.
    (tmp_path / f"{NAME}{shards.SUFFIX}").touch()
    assert shards.is_shard_folder(str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        shards.verify(str(tmp_path / "nowhere"))


def test_remote_shards_are_refused_with_the_fix():
    with pytest.raises(UserError, match="mount the bucket"):
        shards.ShardSource("gs://bucket/folder")


def test_index_is_numpy_alone(tmp_path):
    write_folder(tmp_path)
    content = io.BytesIO((tmp_path / shards.INDEX).read_bytes())
    with np.load(content, allow_pickle=False) as arrays:
        assert arrays["label"].dtype == np.int64
        ends = arrays["id_end"]
        ids = arrays["id_bytes"].tobytes()
    assert ids[: ends[0]].decode() == "class é/0_0.mp4"
