"""The clock of a stream: time stamps that start anew where recordings were joined."""

import dataclasses

import av
import numpy as np


@dataclasses.dataclass(frozen=True)
class Clock:
    """What makes the stamps of joined recordings those of one clock.

    Attributes:
      starts: int64 [n], position of each recording's first packet but the first one's.
      shifts: int64 [n], what is added to stamps from there on.
    """

    starts: np.ndarray
    shifts: np.ndarray

    @classmethod
    def one(cls) -> "Clock":
        """Return that of a single recording."""
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))

    @property
    def is_set_back(self) -> bool:
        """Whether there is more than one recording."""
        return len(self.starts) > 0

    def shift(self, stamps: np.ndarray, unknown: int) -> None:
        """Add the shifts to the stamps of all packets, in place."""
        if self.is_set_back:
            lengths = np.diff(self.starts, append=len(stamps))
            later = stamps[self.starts[0] :]
            later += np.where(later == unknown, 0, np.repeat(self.shifts, lengths))

    def shift_packet(self, packet: av.Packet, position: int) -> None:
        """Add the shift to a packet's stamps."""
        number = int(np.searchsorted(self.starts, position, "right")) - 1
        if number < 0:
            return
        shift = int(self.shifts[number])
        if packet.pts is not None:
            packet.pts += shift
        if packet.dts is not None:
            packet.dts += shift


def make_clock(
    pts: np.ndarray,
    dts: np.ndarray,
    key_positions: np.ndarray,
    interval: int,
    unknown: int,
) -> Clock:
    """Find where the clock is set back; later recordings follow without a gap.

    Within a recording, decoding times do not decrease; where they are unknown, a key
    frame is shown after all frames in front of it. A single packet that breaks this
    rule is an error of the file.

    Args:
      pts: int64 [n], when each packet's frame is shown, in decoding order.
      dts: int64 [n], when each packet is decoded.
      key_positions: int [k], positions of packets with key frames.
      interval: usual distance of frames, where a recording does not show it.
      unknown: stands for a stamp that a packet does not have.
    """
    is_known = dts != unknown
    starts: list[int] = []
    if is_known.any():
        at = dts if is_known.all() else dts[is_known]
        # Neither a packet with too late a time in front, nor one with too early a time.
        found = [
            i
            for i in (np.flatnonzero(at[1:] < at[:-1]) + 1).tolist()
            if (i < 2 or at[i] <= at[i - 2])
            and (i + 1 == len(at) or at[i + 1] <= at[i - 1])
        ]
        starts = np.flatnonzero(is_known)[found].tolist() if found else []
    elif len(key_positions) and pts.min() != unknown:
        latest = np.maximum.reduceat(pts, key_positions)
        later = key_positions[1:]
        starts = later[pts[later] <= latest[:-1]].tolist()
    if not starts:
        return Clock.one()
    shifts: list[int] = []
    end = None
    for start, stop in zip([0, *starts], [*starts, len(pts)], strict=True):
        stamps = pts[start:stop]
        stamps = np.unique(stamps[stamps != unknown])
        if not len(stamps):
            shifts.append(shifts[-1] if shifts else 0)
            continue
        shifts.append(0 if end is None else end - int(stamps[0]))
        if len(stamps) > 1:
            interval = max(1, int(np.median(np.diff(stamps))))
        end = int(stamps[-1]) + shifts[-1] + interval
    return Clock(np.array(starts), np.array(shifts[1:], np.int64))


def spread(times: np.ndarray) -> np.ndarray:
    """Return times that increase: equal ones are spread up to the next one.

    Args:
      times: float [n], not decreasing, not all equal.
    """
    is_new = np.append(True, times[1:] > times[:-1])
    if is_new.all():
        return times
    firsts = np.flatnonzero(is_new)
    # The last group has no next time: it goes on at the mean distance.
    mean = (times[-1] - times[0]) / (len(times) - 1)
    ends = [*firsts, len(times)], [*times[firsts], times[-1] + mean]
    return np.interp(np.arange(len(times)), *ends)
