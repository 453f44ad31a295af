"""Read TensorBoard's files back."""

import io
import struct

import numpy as np
from PIL import Image
from tensorboardX.proto import event_pb2

from vjepa_jax.run import metrics


def read(workdir):
    """Return the events: protos, each framed by its length and checksums."""
    events = []
    for file in sorted((workdir / metrics.TENSORBOARD_FOLDER).iterdir()):
        raw, at = file.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack_from("<Q", raw, at)
            events.append(event_pb2.Event.FromString(raw[at + 12 : at + 12 + length]))
            at += length + 16
    return events


def images(workdir):
    """Return (step, name, uint8 [H, W, 3]) of every image."""
    found = []
    for event in read(workdir):
        for value in event.summary.value:
            if value.HasField("image"):
                png = io.BytesIO(value.image.encoded_image_string)
                pixels = np.asarray(Image.open(png).convert("RGB"))
                found.append((event.step, value.tag, pixels))
    return found
