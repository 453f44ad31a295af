"""Golden files as official files: weights under the official names."""

import json
import pathlib

import numpy as np

from vjepa_jax import convert
from vjepa_jax.weights import files, official

FOLDER = pathlib.Path(__file__).parents[1] / "goldens"
NAMES = sorted(path.stem for path in FOLDER.glob("*.npz"))


class Golden:
    """What the official code computed, and its weights as one of its files has them."""

    def __init__(self, name):
        with np.load(FOLDER / f"{name}.npz") as file:
            self.arrays = {key: file[key] for key in file.files}
        self.meta = json.loads(str(self.arrays["__meta__"]))
        self.content = {}
        for key, value in self.arrays.items():
            part, _, short = key.partition("/")
            if short:
                self.content.setdefault(part, {})[short] = value
        heads = self.meta["num_heads"]
        self.hints = official.Hints("", heads, self.meta.get("predictor_heads", heads))

    def eval_clips(self):
        rng = np.random.default_rng(self.meta["clip_seed"] * 1000 + 999)
        clips = rng.standard_normal(self.meta["eval_clip_shape"], dtype=np.float32)
        return clips.transpose(0, 2, 3, 4, 1)

    def source(self, key=""):
        return files.split(self.content, "x.pt", key)

    def converted(self, key=""):
        return convert.import_source(self.source(key), self.hints)
