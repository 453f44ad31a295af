"""Make a dataset ready: encode videos into shards, or render a synthetic world.

python -m vjepa_jax.data.prepare --data=LIST_OR_FOLDER --output=DIR
python -m vjepa_jax.data.prepare --verify --output=DIR
python -m vjepa_jax.data.prepare --config=configs/world_tiny.py

The first runs on Apache Beam (pip install 'vjepa_jax[prepare]'): on the cores of this
machine, or wherever Beam's options say, which stand behind `--`:

python -m vjepa_jax.data.prepare --data=... --output=gs://bucket/folder -- \
    --runner=DataflowRunner --project=... --region=... --temp_location=gs://...

The same command again goes on where a run was stopped. See docs/data.md.
"""

import logging
import sys

import tqdm
from absl import flags

from vjepa_jax import cli
from vjepa_jax.data import encode_shards, render, shards, sources
from vjepa_jax.data.reencode import Encoding
from vjepa_jax.default_config import UserError, validate

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
    source = sources.open_source(_DATA.value)
    if not isinstance(source, sources.VideoList):
        raise UserError(
            f"--data={_DATA.value} must be a list file or a folder of videos, which "
            f"{type(source).__name__} is not: what it holds is stored already"
        )
    logging.getLogger("apache_beam").setLevel(logging.WARNING)
    manifest = encode_shards.prepare(
        source,
        _OUTPUT.value,
        encoding,
        num_shards=_NUM_SHARDS.value,
        max_bad_fraction=_MAX_BAD_FRACTION.value,
        beam_options=_BEAM_OPTIONS,
    )
    print(
        f"{manifest['num_records']} videos in {manifest['num_shards']} shards in "
        f"{_OUTPUT.value}; {manifest['num_failures']} failed",
        file=sys.stderr,
    )


def _render_world() -> None:
    config = _CONFIG.value
    validate(config)
    if not config.world.path:
        raise UserError("config.world.path is empty: this config names no world")
    rendered = render.render_world(config.world)
    state = "rendered" if rendered else "complete already"
    print(f"world in {config.world.path}: {state}", file=sys.stderr)


def _take_beam_options(argv: list[str]) -> list[str]:
    """Removes what stands behind `--` from a command line and returns it."""
    if "--" not in argv:
        return []
    start = argv.index("--")
    options = argv[start + 1 :]
    del argv[start:]
    return options


if __name__ == "__main__":
    _CONFIG = cli.define_config_flag(required=False)
    _DATA = flags.DEFINE_string("data", "", "List file or folder of videos to encode")
    _OUTPUT = flags.DEFINE_string("output", "", "Folder of the shards, local or gs://")
    _SHORT_SIDE = flags.DEFINE_integer(
        "short_side", _DEFAULTS.short_side, "Pixels; smaller videos keep their size"
    )
    _GOP = flags.DEFINE_integer(
        "gop", _DEFAULTS.gop, "Frames from one key frame to the next"
    )
    _CRF = flags.DEFINE_integer(
        "crf", _DEFAULTS.crf, "x264's quality, 0 (lossless) to 51 (worst)"
    )
    _FPS = flags.DEFINE_float(
        "fps", _DEFAULTS.fps, "Frames per second kept of faster videos; 0: all"
    )
    _NUM_SHARDS = flags.DEFINE_integer(
        "num_shards", 0, "Files to write; 0: by the number of videos", lower_bound=0
    )
    _MAX_BAD_FRACTION = flags.DEFINE_float(
        "max_bad_fraction", 0.05, "Share of the videos that may fail"
    )
    _VERIFY = flags.DEFINE_bool(
        "verify", False, "Compare the shards in --output with their checksums"
    )
    _BEAM_OPTIONS = _take_beam_options(sys.argv)
    cli.run(main)
