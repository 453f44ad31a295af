"""Declare settings with their defaults and ranges."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from vjepa_jax.base.errors import UserError


class Range(NamedTuple):
    """The allowed values of a setting.

    Attributes:
      holds: whether a value is allowed.
      fix: for the message about other values.
    """

    holds: Callable[[Any], bool]
    fix: str


POSITIVE = Range(lambda v: 0 < v < math.inf, "give a positive number")
NOT_NEGATIVE = Range(lambda v: v >= 0, "give zero or a positive number")
EVEN = Range(lambda v: v > 0 and v % 2 == 0, "give a positive even number")
# JAX takes the lowest 32 bits of a seed: larger ones would repeat others.
SEED = Range(lambda v: 0 <= v < 1 << 32, "give a whole number from 0 to 4294967295")
SHARE = Range(lambda v: 0 <= v <= 1, "give a number from 0 to 1")
INNER_SHARE = Range(lambda v: 0 < v < 1, "give a number between 0 and 1")
COUNTS = Range(lambda v: len(v) > 0 and min(v) >= 1, "give positive numbers")


def one_of(known: Sequence[str]) -> Range:
    """Return the range of a choice by name."""
    return Range(known.__contains__, f"known: {', '.join(known) or '(empty)'}")


def pair(highest: float = math.inf) -> Range:
    """Return the range of (low, high) with 0 < low <= high <= highest."""
    bound = f" <= {highest:g}" if highest < math.inf else ""
    return Range(
        lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= highest,
        f"give (low, high) with 0 < low <= high{bound}",
    )


class Settings:
    """A config under construction, and the ranges of its keys.

    Attributes:
      config: the defaults.
      ranges: {key: range} of keys that have one.
    """

    def __init__(self) -> None:
        """Start without any key."""
        self.config = ConfigDict()
        self.ranges: dict[str, Range] = {}

    def add(self, key: str, default: Any, allowed: Range | None = None) -> None:
        """Set the default and the range of a key; dots in it separate nested dicts."""
        *parents, name = key.split(".")
        part = self.config
        for parent in parents:
            if parent not in part:
                part[parent] = ConfigDict()
            part = part[parent]
        part[name] = default
        if allowed is not None:
            self.ranges[key] = allowed

    def remove(self, *keys: str) -> None:
        """Remove keys that are not used."""
        for key in keys:
            parent, _, name = key.rpartition(".")
            del (self.config[parent] if parent else self.config)[name]


def require(holds: bool, key: str, value: Any, fix: str) -> None:
    """Raise UserError, naming the key, its value and the fix, unless it holds."""
    if not holds:
        raise UserError(f"config.{key}={value!r} is out of range: {fix}")


def check_ranges(
    flat: Mapping[str, Any], ranges: Mapping[str, Range], prefix: str = ""
) -> None:
    """Check values against ranges; keys that are absent are skipped.

    Args:
      flat: {key: value}, see `defaults.flatten`.
      ranges: {key: range}.
      prefix: of the keys, for the message.

    Raises:
      UserError: the first value that is not allowed.
    """
    for key, allowed in ranges.items():
        if key in flat:
            require(allowed.holds(flat[key]), prefix + key, flat[key], allowed.fix)
