"""Read and write files of weights: official pickles, Hugging Face's safetensors.

Only the pickles need PyTorch, which is imported only for them.
"""

import dataclasses
import glob
import json
import pathlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vjepa_jax.base.errors import UserError
from vjepa_jax.base.files import absolute, remove, renamed_when_complete
from vjepa_jax.weights import huggingface, rules
from vjepa_jax.weights.rules import State

# The encoders of an official file, in the order in which evaluations prefer them.
# Files of distilled models also have the student's moving average, `ema_encoder`.
ENCODER_KEYS = ("ema_encoder", "target_encoder", "encoder")
# How names of one model begin in the official code, but not in transformers.
_OFFICIAL_STARTS = ("patch_embed.", "pooler.cross_attention_block.")
_SAFETENSORS = ".safetensors"
_MAX_LISTED = 5
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
    if place.is_dir() or place.suffix == _SAFETENSORS:
        return _read_safetensors(place, key)
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
    # A damaged pickle can raise anything.
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(
            f"{place} is not a file of PyTorch weights, or is damaged: {reason}"
        ) from None


def _as_state(content: Mapping[str, Any]) -> dict[str, np.ndarray]:
    arrays = {}
    for name, value in content.items():
        if isinstance(value, np.ndarray):
            arrays[name] = value
            continue
        try:
            arrays[name] = value.detach().float().numpy()
        except (RuntimeError, TypeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"'{name}' is not an array of numbers: {reason}") from None
    return rules.strip_prefixes(arrays)


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) for name in value)
        and all(hasattr(x, "shape") and hasattr(x, "dtype") for x in value.values())
    )


def _is_states(value: Any) -> bool:
    return isinstance(value, Sequence) and bool(value) and all(map(_is_state, value))


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
        elif name == "classifiers" and _is_states(value):
            file.classifiers = [_as_state(state) for state in value]
        elif name in _NOT_A_MODEL:
            file.ignored[name] = _NOT_A_MODEL[name]
        else:
            known = ", ".join((*ENCODER_KEYS, "predictor", "classifier", "classifiers"))
            raise UserError(
                f"{path} holds '{name}', which is not a known part, or has no arrays; "
                f"known: {known}"
            )
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


def _read_safetensors(place: pathlib.Path, key: str) -> WeightFile:
    """Read Hugging Face's weights, or one model under its official names."""
    state: dict[str, np.ndarray] = {}
    for path in _safetensors_of(place):
        arrays = _load_safetensors(path)
        twice = sorted(state.keys() & arrays.keys())
        if twice:
            raise UserError(f"{place}: two files hold '{twice[0]}', one is {path.name}")
        state |= arrays
    if any(name.startswith(_OFFICIAL_STARTS) for name in rules.strip_prefixes(state)):
        return sort_parts(state, str(place), key)
    if key:
        raise UserError(f"--key={key}: Hugging Face's files have one encoder")
    parts = huggingface.to_official(state)
    if "encoder" not in parts:
        raise UserError(f"{place} holds no encoder")
    file = WeightFile(
        {"encoder": parts["encoder"]}, "encoder", parts.get("predictor", {})
    )
    if "classifier" in parts:
        file.classifiers = [parts["classifier"]]
    folder = place if place.is_dir() else place.parent
    config_path = folder / huggingface.CONFIG_FILE
    if config_path.exists():
        config = huggingface.read_config(_load_json(config_path), str(config_path))
        huggingface.require_sizes(config, parts, str(config_path))
        file.num_heads = config.get("num_attention_heads", 0)
        file.predictor_heads = config.get("pred_num_attention_heads", 0)
        file.clip = config.get("frames_per_clip", 64), config.get("crop_size", 256)
    return file


def _safetensors_of(place: pathlib.Path) -> list[pathlib.Path]:
    """Return the files of a model: one, the shards of an index, or all of a folder."""
    if not place.is_dir():
        return [place]
    whole, index = place / huggingface.WEIGHTS_FILE, place / huggingface.INDEX_FILE
    if whole.exists():
        return [whole]
    if not index.exists():
        paths = sorted(place.glob(f"*{_SAFETENSORS}"))
        if not paths:
            raise UserError(f"no {_SAFETENSORS} file in {place}")
        return paths
    shards = _load_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} has no 'weight_map': download it again")
    names = sorted(map(str, shards.values()))
    missing = [name for name in dict.fromkeys(names) if not (place / name).is_file()]
    if missing:
        raise UserError(
            f"{index} names files that are not in the folder: download "
            f"{', '.join(missing[:_MAX_LISTED])}"
        )
    return [place / name for name in dict.fromkeys(names)]


def _load_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path} is not a file of safetensors, or is damaged: {error}"
        ) from None
    except (AttributeError, TypeError) as error:  # a dtype that NumPy does not have
        raise UserError(f"{path} cannot be read: {error}") from None


def _load_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"{path} is not JSON, or is damaged: {error}; download it again"
        ) from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds a JSON {type(content).__name__} instead of an object: "
            "download it again"
        )
    return content


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
