"""What is made into shards, and what a folder of shards says of how far that is."""

import concurrent.futures
import dataclasses
import json
import math
import re

from etils import epath

from vjepa_jax.base.errors import UserError
from vjepa_jax.data.jobs.reencode import Encoding
from vjepa_jax.data.sources import shards

# Files of a folder that is not complete: the job, and its videos.
JOB = f"{shards.MANIFEST}.part"
INPUTS = "inputs.npz"

# A shard is what a stopped run loses of each worker's time; too many are slow to open.
_MAX_RECORDS_PER_SHARD = 512
_MIN_RECORDS_PER_SHARD = 4
_NUM_SHARDS_TO_SPREAD = 64


@dataclasses.dataclass(frozen=True)
class Job:
    """What is prepared and how; two runs of one job share their shards.

    Attributes:
      source: the list or folder, for messages.
      inputs: digest of its paths and labels.
      num_inputs: videos in it.
      num_shards: files that they are spread over, in order.
      encoding: of the videos.
    """

    source: str
    inputs: str
    num_inputs: int
    num_shards: int
    encoding: Encoding

    def to_json(self) -> dict:
        """Returns the beginning of the manifest."""
        fields = dataclasses.asdict(self)
        return {
            "format": shards.FORMAT,
            "source": fields["source"],
            "inputs": fields["inputs"],
            "num_inputs": fields["num_inputs"],
            "num_shards": fields["num_shards"],
            "settings": fields["encoding"],
        }

    @classmethod
    def from_json(cls, content: dict) -> "Job":
        """Reads `to_json`'s fields; raises KeyError or TypeError if there are none."""
        return cls(
            content["source"],
            content["inputs"],
            content["num_inputs"],
            content["num_shards"],
            Encoding(**content["settings"]),
        )

    @property
    def key(self) -> str:
        """Identifies what the shards depend on, but for the bytes of the videos."""
        content = json.dumps(self.to_json(), sort_keys=True)
        return shards.digest_of([content.encode()])

    def shard_names(self) -> list[str]:
        """Returns the names of all shards, without suffixes."""
        return [shards.shard_name(i, self.num_shards) for i in range(self.num_shards)]

    def inputs_of(self, shard: int) -> range:
        """Returns which of the inputs go into a shard."""
        start, stop = (
            i * self.num_inputs // self.num_shards for i in (shard, shard + 1)
        )
        return range(start, stop)


def default_num_shards(num_inputs: int) -> int:
    """Returns 64 shards for 250 to 33000 videos, fewer for fewer, more for more."""
    spread = min(math.ceil(num_inputs / _MIN_RECORDS_PER_SHARD), _NUM_SHARDS_TO_SPREAD)
    return max(1, spread, math.ceil(num_inputs / _MAX_RECORDS_PER_SHARD))


def previous_job(folder: epath.Path) -> Job | None:
    """Returns what the folder was made by; None if nothing says so."""
    for name in (shards.MANIFEST, JOB):
        path = folder / name
        try:
            return Job.from_json(json.loads(path.read_text()))
        except FileNotFoundError:
            continue
        except (ValueError, KeyError, TypeError):
            if not num_noted_shards(folder):
                raise UserError(
                    f"{str(path)!r} is not of this program's shards: give another "
                    "--output"
                ) from None
    return None


def num_noted_shards(folder: epath.Path) -> int:
    """Returns how many shards there are to be, by the name of a note; 0: no note."""
    for path in folder.glob("shard-*.json"):
        if match := re.fullmatch(r"shard-\d+-of-(\d+)\.json", path.name):
            return int(match[1])
    return 0


def check_notes(folder: epath.Path, job: Job) -> None:
    """Refuses shards of another job where only their notes are left to tell."""
    for path in folder.glob("shard-*.json"):
        try:
            is_of_job = json.loads(path.read_text())["job"] == job.key
        except (ValueError, KeyError, TypeError):
            continue  # a damaged one, whose shard will be written anew
        if not is_of_job:
            raise UserError(
                f"{str(path)!r} is of other shards: give the --data and the flags that "
                "they were made with, or another --output, or remove the folder"
            )


def check_same(output: str, previous: Job, job: Job) -> None:
    """Refuses another job than the folder was made by; tells what differs."""
    if previous.key == job.key:
        return
    if (previous.inputs, previous.num_inputs) != (job.inputs, job.num_inputs):
        difference = (
            f"of other videos ({previous.num_inputs} of {previous.source!r}, now "
            f"{job.num_inputs} of {job.source!r})"
        )
    elif previous.source != job.source:
        difference = (
            f"of {previous.source!r}, whose list is that of {job.source!r}, but the "
            "videos may be others"
        )
    else:
        old, new = (
            {"num_shards": j.num_shards, **dataclasses.asdict(j.encoding)}
            for j in (previous, job)
        )
        difference = "made with " + ", ".join(
            f"{key}={old[key]}, not {new[key]}" for key in old if old[key] != new[key]
        )
    raise UserError(
        f"--output={output} holds shards {difference}: give another --output, or "
        "remove the folder"
    )


def read_note(folder: epath.Path, name: str, key: str) -> dict | None:
    """Returns the note of a shard that is complete, judged by the file's size."""
    try:
        note = json.loads((folder / f"{name}.json").read_text())
        size = (folder / f"{name}{shards.SUFFIX}").stat().length
        is_complete = (note["job"], note["num_bytes"]) == (key, size)
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return note if is_complete else None


def read_notes(folder: epath.Path, job: Job) -> list[dict | None]:
    """Returns the notes of all shards, see `read_note`."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:  # remote reads wait
        return list(
            pool.map(lambda name: read_note(folder, name, job.key), job.shard_names())
        )
