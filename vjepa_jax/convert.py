r"""Convert weights: official PyTorch or Hugging Face -> checkpoint, and back.

    python -m vjepa_jax.convert --source=vitl.pt --output=runs/vitl
    python -m vjepa_jax.convert --source=runs/vitl --output=vitl.pt --to=official
    python -m vjepa_jax.convert --source=runs/vitl --output=DIR --to=huggingface

Sources: files of V-JEPA, V-JEPA 2 (pretraining and action-conditioned), V-JEPA 2.1 and
of attentive probes, or a folder of a Hugging Face VJEPA2. Every array is used, or
printed with the reason why not; otherwise nothing is written.
"""

import sys

from absl import flags

from vjepa_jax.run import checkpoint, cli, conversion
from vjepa_jax.weights import official

FORMATS = ("checkpoint", "official", "huggingface")


def main() -> None:
    """Run the command line."""
    checkpoint.quiet_orbax()
    source, output = _SOURCE.value, _OUTPUT.value
    if _TO.value == "checkpoint":
        hints = official.Hints(
            _FAMILY.value or "", _NUM_HEADS.value, _PREDICTOR_HEADS.value
        )
        print(conversion.convert(source, output, hints, _KEY.value).summary())
    elif _TO.value == "official":
        conversion.export_official(source, output, _STEP.value)
    else:
        conversion.export_huggingface(source, output, _STEP.value)
    print(f"written to {output}", file=sys.stderr)


if __name__ == "__main__":
    _SOURCE = flags.DEFINE_string("source", None, "What to convert", required=True)
    _OUTPUT = flags.DEFINE_string("output", None, "What to make", required=True)
    _TO = flags.DEFINE_enum("to", "checkpoint", FORMATS, "Format of the output")
    _FAMILY = flags.DEFINE_enum(
        "family", None, official.FAMILIES, "Family, where the weights do not show it"
    )
    _KEY = flags.DEFINE_string("key", "", "Encoder to take, e.g. target_encoder")
    _NUM_HEADS = flags.DEFINE_integer("num_heads", 0, "Heads, of unpublished sizes")
    _PREDICTOR_HEADS = flags.DEFINE_integer(
        "predictor_heads", 0, "Heads of the predictor, of unpublished sizes"
    )
    _STEP = flags.DEFINE_integer("step", None, "Step to export, by default the latest")
    cli.run(main)
