r"""Prepare a dataset: encode videos into shards, or render a synthetic world.

    python -m vjepa_jax.prepare --data=LIST_OR_FOLDER --output=DIR
    python -m vjepa_jax.prepare --verify --output=DIR
    python -m vjepa_jax.prepare --config=configs/world_tiny.py

The first command runs on Apache Beam (pip install 'vjepa_jax[prepare]'): by default on
the cores of this machine. Options of Beam follow after `--`:

    python -m vjepa_jax.prepare --data=... --output=gs://bucket/folder -- \
        --runner=DataflowRunner --project=... --region=... --temp_location=gs://...

After an interruption the same command continues. See docs/data.md.
"""

import multiprocessing
import os
import signal
import sys
import threading

import tqdm
from absl import flags

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import is_remote
from vjepa_jax.config.flags import define_config_flag
from vjepa_jax.config.rules import validate
from vjepa_jax.data.jobs import encode_shards
from vjepa_jax.data.jobs.reencode import Encoding
from vjepa_jax.data.sources import shards
from vjepa_jax.data.sources.file_lists import VideoList
from vjepa_jax.data.sources.open import open_source
from vjepa_jax.run import cli
from vjepa_jax.world import render

_DEFAULTS = Encoding()


def main() -> None:
    """Run the command line."""
    if (_DATA.value or _VERIFY.value) and not _OUTPUT.value:
        raise UserError("--output is not set: give the folder of the shards")
    if _VERIFY.value:
        num_records = shards.verify(_OUTPUT.value, tqdm.tqdm)
        print(f"{num_records} records in {_OUTPUT.value}: intact", file=sys.stderr)
    elif _DATA.value:
        _encode_shards()
    elif _CONFIG.value:
        _render_world()
    else:
        raise UserError(
            "nothing to prepare: give --data=LIST_OR_FOLDER and --output=DIR, or the "
            "--config of a synthetic world"
        )


def _encode_shards() -> None:
    encoding = Encoding(_SHORT_SIDE.value, _GOP.value, _CRF.value, _FPS.value)
    max_bad_fraction, path = _MAX_BAD_FRACTION.value, _DATA.value
    if not 0 <= max_bad_fraction <= 1:  # NaN is refused as well
        raise UserError(f"--max_bad_fraction must lie in 0..1, not {max_bad_fraction}")
    if "," in path and not is_remote(path) and not os.path.exists(path):
        raise UserError(
            f"--data={path} does not exist; it names one list or folder: prepare "
            "several with one command each, with separate --output"
        )
    source = open_source(path)
    if not isinstance(source, VideoList):
        raise UserError(
            f"--data={_DATA.value} must be a list file or a folder of videos, which "
            f"{type(source).__name__} is not: its videos are stored in records already"
        )
    _end_on_interrupt()
    manifest = encode_shards.prepare(
        source,
        _OUTPUT.value,
        encoding,
        num_shards=_NUM_SHARDS.value,
        max_bad_fraction=max_bad_fraction,
        retry_failures=_RETRY_FAILURES.value,
        beam_options=_BEAM_OPTIONS,
    )
    failed = f"{manifest['num_failures']} failed"
    if manifest["num_failures"]:
        failed += f", see {shards.FAILURES}; --retry_failures tries them again"
    print(
        f"{manifest['num_records']} videos in {manifest['num_shards']} shards in "
        f"{_OUTPUT.value}; {failed}",
        file=sys.stderr,
    )


def _end_on_interrupt() -> None:
    """Make Ctrl-C end this process at once, whatever its main thread does.

    Beam would first finish the shards of its threads, then print a long traceback.
    """
    readable, writable = os.pipe()
    os.set_blocking(writable, False)
    signal.set_wakeup_fd(writable)
    signal.signal(signal.SIGINT, lambda signum, frame: None)

    def end() -> None:
        os.read(readable, 1)
        for child in multiprocessing.active_children():
            child.kill()
        print(
            "\ninterrupted; the same command continues (a job on another machine, such "
            "as on Dataflow, keeps running)",
            file=sys.stderr,
            flush=True,
        )
        os._exit(cli.EXIT_INTERRUPTED)

    threading.Thread(target=end, daemon=True).start()


def _render_world() -> None:
    config = _CONFIG.value
    validate(config)
    if not config.world.path:
        raise UserError("config.world.path is empty: this config names no world")
    rendered = render.render_world(config.world)
    state = "rendered" if rendered else "was complete"
    print(f"world in {config.world.path}: {state}", file=sys.stderr)


def _take_beam_options(argv: list[str]) -> list[str]:
    """Remove the arguments after `--` from a command line and return them."""
    if "--" not in argv:
        return []
    start = argv.index("--")
    options = argv[start + 1 :]
    del argv[start:]
    return options


if __name__ == "__main__":
    _CONFIG = define_config_flag(required=False)
    _DATA = flags.DEFINE_string(
        "data", "", "List file or folder of the videos to encode"
    )
    _OUTPUT = flags.DEFINE_string("output", "", "Folder of the shards, local or gs://")
    _SHORT_SIDE = flags.DEFINE_integer(
        "short_side", _DEFAULTS.short_side, "Pixels; smaller videos are not enlarged"
    )
    _GOP = flags.DEFINE_integer(
        "gop", _DEFAULTS.gop, "Frames from one key frame to the next"
    )
    _CRF = flags.DEFINE_integer(
        "crf", _DEFAULTS.crf, "x264's quality, 0 (lossless) to 51 (worst)"
    )
    _FPS = flags.DEFINE_float(
        "fps", _DEFAULTS.fps, "Largest number of frames per second; 0: keep all frames"
    )
    _NUM_SHARDS = flags.DEFINE_integer(
        "num_shards",
        0,
        "Number of shards; 0: chosen by the number of videos",
        lower_bound=0,
    )
    _MAX_BAD_FRACTION = flags.DEFINE_float(
        "max_bad_fraction", 0.05, "Largest share of the videos that may fail"
    )
    _RETRY_FAILURES = flags.DEFINE_bool(
        "retry_failures", False, "Write shards with failed videos again"
    )
    _VERIFY = flags.DEFINE_bool(
        "verify", False, "Compare the shards in --output with their checksums"
    )
    _BEAM_OPTIONS = _take_beam_options(sys.argv)
    cli.run(main)
