"""A process of a group that does not train: it meets the others, stops or fails.

python distributed_program.py MODE ADDRESS COUNT RANK
"""

import signal
import sys
import time

import jax

from vjepa_jax.base.errors import UserError
from vjepa_jax.parallel import distributed

USER_ERROR_CODE = 2
# Longest wait for something that happens for certain, on the busiest machine.
TIMEOUT_SECS = 1800
MISSED_SECS = 10  # the processes that do not miss a barrier are apart by less
START_SECS = 2  # longest wait for a process that is not there


def meet(rank):
    """Exchange small data; then wait at a barrier that the last process misses."""
    distributed.barrier("met", TIMEOUT_SECS)
    numbers = distributed.sum_on_main("numbers", [rank, 10], TIMEOUT_SECS)
    text = distributed.from_main("text", f"of {rank}", TIMEOUT_SECS)
    problems = [
        distributed.first_problem(
            f"problem/{of}", f"of {rank}" * (rank in of), TIMEOUT_SECS
        )
        for of in ((), (1, 2), (0, 2))
    ]
    print(f"{numbers} {text} {problems}", flush=True)
    try:
        if rank < distributed.process_count() - 1:
            distributed.barrier("missed", MISSED_SECS)
    except distributed.LostProcess as error:
        print(str(error).replace("\n", " "), flush=True)


def stop(rank, ctrl_c=0):
    """Take steps of different lengths until all stop; Ctrl-C comes to the first."""
    with distributed.StopRequest() as request:
        for step in range(1, 1_000_000):
            print(step, flush=True)
            time.sleep(0.01 * (1 + rank))
            if rank == 0 and step == 5:
                for _ in range(ctrl_c):
                    signal.raise_signal(signal.SIGINT)
            # Orbax may ask once more.
            if request.is_agreed(step) or request.is_agreed(step):
                sys.exit(request.exit_code)


def fail(rank, user_errors=(), mistakes=()):
    """Fail in some of the processes; the others wait."""
    if rank in user_errors:
        raise UserError(f"process {rank} cannot go on")
    if rank in mistakes:
        raise RuntimeError("a mistake in the program")
    time.sleep(2 * TIMEOUT_SECS)


def main():
    mode, address, count, rank = sys.argv[1:]
    rank = int(rank)
    # In these modes a process ends before the others, which notice by its silence.
    is_lonely_end = mode in ("ctrl_c_twice", "fail_one")
    distributed._FAIL_TOGETHER_SECS = 1 if is_lonely_end else TIMEOUT_SECS
    with distributed.exit_on_error(USER_ERROR_CODE):
        for _ in range(2):  # the second time it does nothing
            distributed.initialize(
                address,
                int(count),
                rank,
                start_timeout_secs=START_SECS if mode == "wait" else TIMEOUT_SECS,
                heartbeat_timeout_secs=10 if is_lonely_end else TIMEOUT_SECS,
            )
        assert jax.process_count() == int(count)
        print("started", flush=True)
        if mode == "meet_and_stop":
            meet(rank)
            stop(rank)
        elif mode == "stop":
            stop(rank)
        elif mode == "ctrl_c_twice":
            stop(rank, ctrl_c=2)
        elif mode == "fail_all":
            fail(rank, user_errors=(0, 1), mistakes=(2,))
        elif mode == "fail_one":
            fail(rank, user_errors=(1,))


if __name__ == "__main__":
    main()
