"""A process of a group, without training: waits, stops or fails as it is told.

python distributed_program.py MODE ADDRESS COUNT RANK
"""

import signal
import sys
import time

import jax

from vjepa_jax.base.errors import UserError
from vjepa_jax.parallel import distributed

USER_ERROR_CODE = 2


def meet(rank):
    """Sums, texts and barriers; then a barrier that the last process misses."""
    distributed.barrier("met", 60)
    numbers = distributed.sum_on_main("numbers", [rank, 10], 60)
    text = distributed.from_main("text", f"of {rank}", 60)
    print(f"{numbers} {text}", flush=True)
    try:
        if rank < distributed.process_count() - 1:
            distributed.barrier("missed", 0.5)
    except distributed.LostProcess as error:
        print(str(error).replace("\n", " "), flush=True)


def stop(rank, ctrl_c=0):
    """Take steps of different lengths until all stop; Ctrl-C comes to the first."""
    with distributed.StopRequest() as request:
        for step in range(1, 10_000):
            print(step, flush=True)
            time.sleep(0.01 * (1 + rank))
            if rank == 0 and step == 5:
                for _ in range(ctrl_c):
                    signal.raise_signal(signal.SIGINT)
            # Orbax may ask once more.
            if request.is_agreed(step) or request.is_agreed(step):
                sys.exit(request.exit_code)


def fail(rank, *who):
    """Fail in some of the processes; the others wait for them for ever."""
    if rank in who:
        raise UserError(f"process {rank} cannot go on")
    time.sleep(600)


def main():
    mode, address, count, rank = sys.argv[1:]
    rank = int(rank)
    start_timeout_secs = 2 if mode == "wait" else 60
    with distributed.ending_together(USER_ERROR_CODE):
        for _ in range(2):  # the second time it does nothing
            distributed.initialize(
                address, int(count), rank, start_timeout_secs, heartbeat_timeout_secs=4
            )
        assert jax.process_count() == int(count)
        print("started", flush=True)
        if mode == "meet":
            meet(rank)
        elif mode == "stop":
            stop(rank)
        elif mode == "ctrl_c_twice":
            stop(rank, ctrl_c=2)
        elif mode == "fail_all":
            fail(rank, 0, 1)
        elif mode == "fail_one":
            fail(rank, 1)
        elif mode == "raise":
            raise RuntimeError("a mistake in the program")


if __name__ == "__main__":
    main()
