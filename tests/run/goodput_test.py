"""All wall time is accounted for, over restarts, too."""

import time

import pytest

from vjepa_jax.run.goodput import PARTS, TimeAccount


@pytest.fixture
def advance(monkeypatch):
    """Replace the clock by one that this function advances."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def spend(account, advance, seconds):
    for part, secs in seconds.items():
        with account.measure(part):
            advance(secs)


def test_shares_are_of_the_wall_time(advance):
    account = TimeAccount()
    advance(3.0)
    spend(account, advance, {"compile": 2.0})
    account.end_startup()
    spend(account, advance, {"data": 1.0, "step": 10.0, "checkpoint": 1.0})
    spend(account, advance, {"evaluation": 1.0})
    advance(2.0)
    assert account.scalars() == pytest.approx(
        {
            "goodput/startup": 0.15,
            "goodput/compile": 0.1,
            "goodput/data": 0.05,
            "goodput/step": 0.5,
            "goodput/checkpoint": 0.05,
            "goodput/evaluation": 0.05,
            "goodput/lost": 0.0,
            "goodput/other": 0.1,
            "perf/wall_seconds": 20.0,
        }
    )
    assert account.summary() == (
        "20 s of wall time: step 50.0%, startup 15.0%, compile 10.0%, "
        "other 10.0%, data 5.0%, checkpoint 5.0%, evaluation 5.0%"
    )


def test_restarts_add_up_and_steps_done_twice_are_lost(advance, rng):
    rows, expected, saved = [], dict.fromkeys(PARTS, 0.0), 0
    for _ in range(3):
        account = TimeAccount()
        account.add_earlier(rows, saved)
        rows = [row for row in rows if row["step"] <= saved]
        startup, *steps = rng.uniform(0.1, 5.0, 6)
        advance(startup)
        account.end_startup()
        expected["startup"] += startup
        for step, secs in enumerate(steps, start=saved + 1):
            spend(account, advance, {"step": secs})
            rows.append({"step": step, **account.scalars()})
        # The last two steps are not in the checkpoint.
        saved += 3
        expected["step"] += sum(steps[:3])
        expected["lost"] += sum(steps[3:])
    account = TimeAccount()
    account.add_earlier(rows, saved)
    assert account.seconds == pytest.approx(expected)
    assert account.total_seconds() == pytest.approx(sum(expected.values()))


def test_runs_without_shares_count_as_other(advance):
    account = TimeAccount()
    account.add_earlier([{"step": 4, "perf/wall_seconds": 30.0}], 4)
    advance(10.0)
    account.end_startup()
    scalars = account.scalars()
    assert scalars["perf/wall_seconds"] == 40
    assert scalars["goodput/other"] == pytest.approx(0.75)
    assert scalars["goodput/startup"] == pytest.approx(0.25)


def test_time_of_errors_is_measured(advance):
    account = TimeAccount()
    with pytest.raises(ValueError, match="x"), account.measure("data"):
        advance(1.0)
        raise ValueError("x")
    assert account.seconds["data"] == 1.0
