"""Read and write files of weights: official pickles, Hugging Face's safetensors.

Only the pickles need PyTorch, which is imported only for them.
"""

import dataclasses
import glob
import json
import pathlib
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import absolute, remove, renamed_when_complete
from vjepa_jax.weights import huggingface, rules
from vjepa_jax.weights.rules import State

# The encoders of an official file, in the order in which evaluations prefer them.
# Files of distilled models also have the student's moving average, `ema_encoder`.
ENCODER_KEYS = ("ema_encoder", "target_encoder", "encoder")
# Entries that are not weights of a model, with the reason why they are not used.
_NOT_A_MODEL = {
    "opt": "state of the optimiser",
    "optimizer": "state of the optimiser",
    "scaler": "state of the gradient's scaling",
    "epoch": "about the run",
    "loss": "about the run",
    "batch_size": "about the run",
    "world_size": "about the run",
    "lr": "about the run",
}


@dataclasses.dataclass
class WeightFile:
    """The contents of a file of weights, under official names without prefixes.

    Attributes:
      encoders: the encoders by their key in the file.
      target_key: key of the encoder to take.
      predictor: empty where the file has none.
      classifiers: heads of probes.
      ignored: names that are not used, with the reason.
      num_heads, predictor_heads: 0 where the file does not state them.
      clip: (frames, side in pixels); None where the file does not state it.
    """

    encoders: dict[str, State] = dataclasses.field(default_factory=dict)
    target_key: str = ""
    predictor: State = dataclasses.field(default_factory=dict)
    classifiers: list[State] = dataclasses.field(default_factory=list)
    ignored: dict[str, str] = dataclasses.field(default_factory=dict)
    num_heads: int = 0
    predictor_heads: int = 0
    clip: tuple[int, int] | None = None


def read(path: str, key: str = "") -> WeightFile:
    """Read a `.pt` or `.pth.tar` file, or a folder or file of safetensors.

    Args:
      path: the file, or the folder of a Hugging Face model.
      key: the encoder to take, where a file has several; "": the first of
        `ENCODER_KEYS` that the file has.

    Raises:
      UserError: the file is missing, has no weights, or does not have this key.
    """
    place = pathlib.Path(path).expanduser()
    if not place.exists():
        raise UserError(f"no such file: {place}")
    if place.is_dir() or place.suffix == ".safetensors":
        return _read_huggingface(place, key)
    return sort_parts(_load_pickle(place), str(place), key)


def _import_torch() -> Any:
    try:
        import torch
    except ImportError:
        raise UserError(
            "official weights are pickles of PyTorch, which is not installed: "
            'pip install "vjepa_jax[torch]"'
        ) from None
    return torch


def _load_pickle(place: pathlib.Path) -> Any:
    torch = _import_torch()
    try:
        # Mapped, so that the optimiser's state, twice the weights, is never read.
        return torch.load(
            place,
            map_location="cpu",
            weights_only=True,
            mmap=zipfile.is_zipfile(place) or None,
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{place} is not a file of PyTorch weights: {reason}") from None


def _as_state(content: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
        else:
            arrays[name] = value.detach().float().numpy()
    return rules.strip_prefixes(arrays)


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(hasattr(x, "shape") and hasattr(x, "dtype") for x in value.values())
    )


def sort_parts(content: Any, path: str, key: str = "") -> WeightFile:
    """Sort the parts of an official file.

    Args:
      content: the unpickled file; arrays are PyTorch's or numpy's.
      path: of the file, for messages.
      key: see `read`.

    Raises:
      UserError: it holds an unknown part, or no model.
    """
    if _is_state(content):  # the state dict of one model
        names = list(rules.strip_prefixes(content))
        is_probe = any(name.startswith("pooler.") for name in names)
        content = {"classifier" if is_probe else "encoder": content}
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds no dictionary of weights")
    file = WeightFile()
    for name, value in content.items():
        if name in ENCODER_KEYS and _is_state(value):
            file.encoders[name] = _as_state(value)
        elif name == "predictor" and _is_state(value):
            file.predictor = _as_state(value)
        elif name == "classifier" and _is_state(value):
            file.classifiers = [_as_state(value)]
        elif name == "classifiers" and value and all(map(_is_state, value)):
            file.classifiers = [_as_state(state) for state in value]
        elif name in _NOT_A_MODEL:
            file.ignored[name] = _NOT_A_MODEL[name]
        else:
            raise UserError(f"{path} holds '{name}', which is not a known part")
    _choose_target(file, path, key)
    return file


def _choose_target(file: WeightFile, path: str, key: str) -> None:
    keys = [name for name in ENCODER_KEYS if name in file.encoders]
    if key and key not in keys:
        listed = ", ".join(keys) or "none"
        raise UserError(f"--key={key}: {path} has no such encoder; it has: {listed}")
    if not keys:
        if not (file.classifiers or "action_encoder.weight" in file.predictor):
            raise UserError(f"{path} holds neither an encoder nor a probe")
        return
    file.target_key = key or keys[0]
    for name in keys:
        if name not in (file.target_key, "encoder"):
            del file.encoders[name]
            file.ignored[name] = f"another encoder: --key={name} takes it"


def _read_huggingface(place: pathlib.Path, key: str) -> WeightFile:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    if key:
        raise UserError(f"--key={key}: Hugging Face's files have one encoder")
    folder = place if place.is_dir() else place.parent
    paths = sorted(place.glob("*.safetensors")) if place.is_dir() else [place]
    if not paths:
        raise UserError(f"no .safetensors file in {place}")
    state: dict[str, np.ndarray] = {}
    try:
        for path in paths:
            state |= load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a file of safetensors: {error}") from None
    parts = huggingface.to_official(state)
    if "encoder" not in parts:
        raise UserError(f"{place} holds no encoder")
    file = WeightFile(
        {"encoder": parts["encoder"]}, "encoder", parts.get("predictor", {})
    )
    if "classifier" in parts:
        file.classifiers = [parts["classifier"]]
    config_path = folder / huggingface.CONFIG_FILE
    if config_path.exists():
        config = json.loads(config_path.read_text())
        kind = config.get("model_type", huggingface.MODEL_TYPE)
        if kind != huggingface.MODEL_TYPE:
            raise UserError(f"{config_path} is of a '{kind}', not of a V-JEPA 2")
        activation = config.get("hidden_act", "gelu")
        if activation != "gelu":
            raise UserError(f"{config_path}: hidden_act '{activation}' is unknown")
        file.num_heads = config.get("num_attention_heads", 16)
        file.predictor_heads = config.get("pred_num_attention_heads", 12)
        file.clip = config.get("frames_per_clip", 64), config.get("crop_size", 256)
    return file


def require_free(path: str) -> None:
    """Raise UserError where `path` is a file, or a folder that is not empty."""
    place = pathlib.Path(path).expanduser()
    if place.is_file() or (place.is_dir() and any(place.iterdir())):
        raise UserError(f"{place} exists: give another --output")


def write_complete(path: str, write: Callable[[pathlib.Path], None]) -> None:
    """Write a file or folder under a temporary name, then rename it.

    Raises:
      UserError: `path` exists.
    """
    require_free(path)
    place = pathlib.Path(absolute(path))
    place.parent.mkdir(parents=True, exist_ok=True)
    for leftover in place.parent.glob(f".{glob.escape(place.name)}-*.part"):
        remove(leftover)  # left by a conversion that was killed
    with renamed_when_complete(place) as part:
        write(pathlib.Path(part))


def write_official(path: str, parts: Mapping[str, Any], prefix: str) -> None:
    """Write a `.pt` file.

    Args:
      path: of the file.
      parts: {part: state dict, or list of state dicts}.
      prefix: of all names except those of probes, whose prefix is always `module.`,
        because the official code does not wrap them in a backbone.

    Raises:
      UserError: `path` exists.
    """
    torch = _import_torch()
    if pathlib.Path(path).expanduser().is_dir():
        raise UserError(f"{path} is a folder: give the name of a file as --output")

    def tensors(part: Any, prefix: str) -> Any:
        if isinstance(part, list):
            return [tensors(state, prefix) for state in part]
        return {
            prefix + name: torch.from_numpy(np.array(value))
            for name, value in part.items()
        }

    content = {
        name: tensors(part, "module." if name.startswith("classifier") else prefix)
        for name, part in parts.items()
    }
    write_complete(path, lambda place: torch.save(content, place))


def write_huggingface(path: str, state: State, config: Mapping[str, Any]) -> None:
    """Write a folder that transformers loads: `model.safetensors`, `config.json`."""
    from safetensors.numpy import save_file

    def write(folder: pathlib.Path) -> None:
        folder.mkdir()
        file = folder / huggingface.WEIGHTS_FILE
        save_file(dict(state), file, metadata={"format": "pt"})
        text = json.dumps(dict(config), indent=2) + "\n"
        (folder / huggingface.CONFIG_FILE).write_text(text)

    write_complete(path, write)
