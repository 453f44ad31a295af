"""Measure the speed of reading clips from video files, beside decord and torchcodec.

    pip install -e '.[bench,prepare]'   # torchcodec also needs FFmpeg's libraries
    python benchmarks/data.py [--quick] [--folder=runs/data_bench]

The videos are generated: moving textures with the spectrum of photographs, and grain.
A clip is 16 frames with step 4 from a random start, a random resized crop of 224
pixels, uint8. Decoders run on one core, with one thread, and take turns on the same
clips. Their time is processor time; a ratio is the median over rounds, each of which
reads every video once. Prints Markdown tables.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import multiprocessing
import os
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import markdown
import numpy as np
from video_sets import FPS, HD, KINETICS, SETS, VideoSet, make_set

from vjepa_jax import check
from vjepa_jax.config import defaults
from vjepa_jax.data.clips.reader import ClipReader, inspect
from vjepa_jax.data.clips.sampling import Sampling
from vjepa_jax.data.sources.open import open_mixture, open_source
from vjepa_jax.data.stream.bad_videos import BadVideoLimits
from vjepa_jax.data.stream.pipeline import Batching, TrainIterator
from vjepa_jax.data.stream.workers import Workers
from vjepa_jax.data.transforms.transforms import ClipTransform

NUM_FRAMES, FRAME_STEP, SIZE = 16, 4, 224
SAMPLING, TRANSFORM = Sampling(NUM_FRAMES, FRAME_STEP), ClipTransform(SIZE)
READER = ClipReader(SAMPLING, SIZE)
# Its crops have the same sizes as the others', at other positions.
OTHER_CROPS = "torchcodec, its transforms"

# Read the clip of (video, seed): uint8 [T, S, S, 3].
Read = Callable[[int, int], np.ndarray]


# The decoders.


def _draw(seed: int, num_frames: int, height: int, width: int):
    """Draw the clip that all decoders read: frame indices and crop box."""
    rng = np.random.default_rng(seed)
    (indices,) = SAMPLING.frames(np.arange(num_frames) / FPS, FPS, rng)
    return indices.tolist(), TRANSFORM.crop_box(height, width, rng)


def _read_ours(videos: Sequence, video: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    crop = functools.partial(TRANSFORM.crop_box, rng=rng)
    (clip,) = READER.read(videos[video], crop, rng)
    return clip


def _resized(frames, box) -> np.ndarray:
    """Crop and resize a torch tensor, uint8 [T, 3, H, W], channels last in memory.

    PyTorch's antialiased bilinear filter for uint8 computes in integers, with AVX2.
    """
    import torch

    top, left, height, width = box
    frames = frames[:, :, top : top + height, left : left + width]
    frames = torch.nn.functional.interpolate(
        frames, size=(SIZE, SIZE), mode="bilinear", antialias=True
    )
    return frames.permute(0, 2, 3, 1).numpy()


def _read_decord(paths: Sequence[str], video: int, seed: int) -> np.ndarray:
    import decord
    import torch

    reader = decord.VideoReader(paths[video], num_threads=1)
    indices, box = _draw(seed, *_shape_of(paths[video]))
    frames = torch.from_numpy(reader.get_batch(indices).asnumpy())
    return _resized(frames.permute(0, 3, 1, 2), box)


@functools.cache
def _shape_of(path: str) -> tuple[int, int, int]:
    info = inspect(path)
    return info.frames, info.height, info.width


def _read_torchcodec(
    mode: str, paths: Sequence[str], video: int, seed: int
) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(paths[video], num_ffmpeg_threads=1, seek_mode=mode)
    indices, box = _draw(seed, *_shape_of(paths[video]))
    return _resized(decoder.get_frames_at(indices=indices).data, box)


def _read_torchcodec_transformed(
    paths: Sequence[str], video: int, seed: int
) -> np.ndarray:
    """Crop and resize in the decoder, which draws the position of the crop itself."""
    from torchcodec import transforms
    from torchcodec.decoders import VideoDecoder

    indices, box = _draw(seed, *_shape_of(paths[video]))
    crop, resize = transforms.RandomCrop(box[2:]), transforms.Resize((SIZE, SIZE))
    decoder = VideoDecoder(
        paths[video], num_ffmpeg_threads=1, transforms=[crop, resize]
    )
    return decoder.get_frames_at(indices=indices).data.permute(0, 2, 3, 1).numpy()


def make_readers(paths: Sequence[str]) -> dict[str, Read]:
    """Return functions that read clips of the files, by name; ours first."""
    readers = {
        "ours": _read_ours,
        "decord": _read_decord,
        "torchcodec": functools.partial(_read_torchcodec, "exact"),
        "torchcodec, approximate": functools.partial(_read_torchcodec, "approximate"),
        OTHER_CROPS: _read_torchcodec_transformed,
    }
    return {name: functools.partial(read, paths) for name, read in readers.items()}


def check_agreement(readers: dict[str, Read]) -> None:
    """Raise unless all read the same frames; filters and colours differ a little."""
    ours = readers["ours"](0, 5).astype(int)
    for name, read in readers.items():
        if name == OTHER_CROPS:
            continue
        difference = np.abs(read(0, 5) - ours)
        others = np.abs(read(0, 6) - ours)
        if difference.mean() > 6 or difference.mean() > 0.5 * others.mean():
            raise RuntimeError(
                f"{name} reads other pixels: they differ by {difference.mean():.1f}"
            )


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this process, and the threads that it starts, on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def take_turns(
    readers: dict[str, Read], num_videos: int, num_rounds: int
) -> dict[str, list[float]]:
    """Return clips per second of processor time, for each reader and round."""
    rates = {name: [] for name in readers}
    with one_core():
        for read in readers.values():
            read(0, 0)
        for i in range(num_rounds):
            secs = dict.fromkeys(readers, 0.0)
            for video in range(num_videos):
                seed = i * num_videos + video
                # The first reader finds the file cold in the processor's caches.
                turn = seed % len(readers)
                names = [*readers]
                for name in names[turn:] + names[:turn]:
                    start = time.process_time()
                    readers[name](video, seed)
                    secs[name] += time.process_time() - start
            for name in readers:
                rates[name].append(num_videos / secs[name])
    return rates


def _ratio(rates: dict[str, list[float]], name: str, other: str) -> str:
    pairs = zip(rates[name], rates[other], strict=True)
    ratios = sorted(a / b for a, b in pairs)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def compare_decoders(
    paths_of: dict[VideoSet, list[str]], num_rounds: int
) -> dict[str, float]:
    """Print the table of decoders; return our clips per second for each set."""
    ours, rows, head = {}, [], []
    for of, paths in paths_of.items():
        readers = make_readers(paths)
        check_agreement(readers)
        rates = take_turns(readers, len(paths), num_rounds)
        ours[of.name] = statistics.median(rates["ours"])
        num_bytes = statistics.mean(os.path.getsize(path) for path in paths)
        peers = [name for name in readers if name != "ours"]
        head = ["videos", "KB", *readers, *(f"ours / {name}" for name in peers)]
        rows.append(
            [of.name, f"{num_bytes / 1e3:.0f}"]
            + [f"{statistics.median(rates[name]):.1f}" for name in readers]
            + [_ratio(rates, "ours", name) for name in peers]
        )
    print("Clips per second and core:\n")
    markdown.print_table(head, rows)
    return ours


def compare_shards(folder: pathlib.Path, paths: list[str], num_rounds: int) -> float:
    """Compare prepared shards with their 720p originals; return the shards' clips/s."""
    originals = pathlib.Path(paths[0]).parent
    prepared = folder / "shards" / originals.name
    command = [sys.executable, "-m", "vjepa_jax.prepare"]
    command += [f"--data={originals}", f"--output={prepared}"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    records = open_source(str(prepared))
    readers = {
        "originals": functools.partial(_read_ours, paths),
        "shards": functools.partial(_read_ours, records),
    }
    rates = take_turns(readers, len(paths), num_rounds)
    print("Prepared shards (short side 320, GOP 12) beside their originals at 720p:\n")
    medians = [statistics.median(rates[name]) for name in readers]
    markdown.print_table(
        [*readers, "shards / originals"],
        [[*(f"{m:.1f}" for m in medians), _ratio(rates, "shards", "originals")]],
    )
    return medians[1]


def compare_workers(paths: list[str], num_rounds: int, num_batches: int) -> None:
    """Compare the pipeline, in wall time, with decoding on one core."""
    # As many records as in a data set: Grain's shuffle of a few records is slow, as its
    # cipher steps through thousands of indices that are out of range.
    listed = pathlib.Path(paths[0]).parent / "repeated.csv"
    listed.write_text("".join(f"{path} 0\n" for path in paths * 10_000))
    source = open_mixture(str(listed))
    batch_size = 8
    rates = {"one core": [], "1 worker": [], "2 workers": []}
    for i in range(num_rounds):
        with one_core():
            start = time.perf_counter()
            for j in range(num_batches * batch_size):
                _read_ours(paths, j % len(paths), i * 1000 + j)
            elapsed = time.perf_counter() - start
        rates["one core"].append(num_batches * batch_size / elapsed)
        for num_workers in (1, 2):
            with TrainIterator(
                source,
                READER,
                TRANSFORM,
                Batching(batch_size, seed=i),
                Workers(num_workers, timeout_secs=60.0, prefetch_megabytes=1.0),
                BadVideoLimits(max_fraction=0.0),
            ) as batches:
                for _ in range(4):  # buffers fill while workers start
                    next(batches)
                start = time.perf_counter()
                for _ in range(num_batches):
                    next(batches)
                elapsed = time.perf_counter() - start
            name = f"{num_workers} worker{'s' * (num_workers > 1)}"
            rates[name].append(num_batches * batch_size / elapsed)
    print(f"The pipeline on {KINETICS.name}, clips per second in wall time:\n")
    medians = [f"{statistics.median(rate):.1f}" for rate in rates.values()]
    ratios = [_ratio(rates, name, "one core") for name in [*rates][1:]]
    names = [f"{name} / one core" for name in [*rates][1:]]
    markdown.print_table([*rates, *names], [medians + ratios])


def _resident_megabytes() -> float:
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _measure_memory(paths: list[str], num_clips: int, connection) -> None:
    """Send the memory after a tenth, half and all of the clips, in MB."""
    marks = []
    for i in range(num_clips):
        _read_ours(paths, i % len(paths), i)
        if i + 1 in (num_clips // 10, num_clips // 2, num_clips):
            gc.collect()
            marks.append(_resident_megabytes())
    connection.send(marks)


def print_memory(paths: list[str], num_clips: int) -> None:
    """Read many clips in a new process and print its memory."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_measure_memory, args=(paths, num_clips, theirs))
    process.start()
    theirs.close()
    marks = ours.recv()
    process.join()
    print(f"Resident memory over {num_clips} clips, MB:\n")
    markdown.print_table(
        ["a tenth", "half", "all"], [[f"{mark:.0f}" for mark in marks]]
    )


def print_cores(rates: dict[str, float]) -> None:
    """Print how many host cores keep a chip busy."""
    rows = []
    for label, size in (("ViT-B", "base"), ("ViT-L", "large"), ("ViT-g", "giant")):
        config = defaults.get_config()
        config.model.encoder.size = size
        config.data.resolution = 256
        per_clip = check.flops_per_clip(config)
        for chip in check.CHIPS:
            wanted = check.clips_per_second(per_clip, chip)
            cores = [f"{wanted / rate:.1f}" for rate in rates.values()]
            rows.append(
                [label, f"{per_clip / 1e12:.2f}", chip, f"{wanted:.0f}", *cores]
            )
    print(
        "Host cores that keep a chip busy, 16 frames of 256 pixels, at "
        f"{check.ASSUMED_MFU:.0%} of its peak:\n"
    )
    markdown.print_table(["model", "TFLOP per clip", "chip", "clips/s", *rates], rows)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--folder", type=pathlib.Path, default=pathlib.Path("runs/data_bench")
    )
    parser.add_argument(
        "--quick", action="store_true", help="few short videos, rough numbers"
    )
    options = parser.parse_args()
    secs, num_rounds, num_clips = (4, 3, 100) if options.quick else (10, 11, 2000)

    import torch  # for the peers' resizing

    torch.set_num_threads(1)
    paths_of = {}
    for of in SETS:
        if options.quick:
            of = dataclasses.replace(of, num_videos=1)
        paths_of[of] = make_set(options.folder, of, secs)
    kinetics, hd = ([*paths_of.values()][SETS.index(of)] for of in (KINETICS, HD))
    rates = compare_decoders(paths_of, num_rounds)
    shards = compare_shards(options.folder, hd, num_rounds)
    rates["shards of 720p"] = shards
    compare_workers(kinetics, 3, num_batches=4 if options.quick else 20)
    print_memory(kinetics, num_clips)
    print_cores(rates)


if __name__ == "__main__":
    main()
