"""Mixtures keep the stated shares, on every host, and are pure functions of place."""

from collections import Counter

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vjepa_jax.data.sources import records as records_module
from vjepa_jax.data.sources.records import Mixture, Record, Source


class Numbers(Source):
    """Records that are numbers."""

    def __init__(self, name, count):
        self.name, self.labels = name, np.arange(count)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return Record(f"{self.name}-{range(len(self))[index]}", index)

    def path_of(self, index):
        return self[index].path

    def digest(self):
        return f"{self.name}{len(self)}"


def make_mixture(*parts):
    return Mixture(
        [(Numbers("abcdef"[i], n), weight) for i, (n, weight) in enumerate(parts)]
    )


counts = st.lists(st.integers(1, 30), min_size=1, max_size=5)


@given(counts)
def test_records_are_numbered_through(lengths):
    mixture = make_mixture(*((n, 1.0) for n in lengths))
    wanted = [f"{'abcdef'[k]}-{i}" for k, n in enumerate(lengths) for i in range(n)]
    assert len(mixture) == len(wanted)
    assert [record.path for record in mixture] == wanted
    assert [mixture.path_of(i) for i in range(len(mixture))] == wanted
    assert mixture[-1].path == wanted[-1]
    np.testing.assert_array_equal(
        mixture.labels, np.concatenate([np.arange(n) for n in lengths])
    )
    for i, path in enumerate(wanted):
        siblings = {mixture.path_of(j)[0] for j in mixture.neighbours(i)}
        assert siblings == {path[0]}
        assert len(mixture.neighbours(i)) == lengths["abcdef".index(path[0])]
    with pytest.raises(IndexError):
        mixture[len(wanted)]


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 40), st.integers(0, 2**31 - 1))
def test_an_epoch_is_a_permutation(length, seed):
    mixture = make_mixture((length, 1.0))
    samples = mixture.samples(seed)
    drawn = [mixture.split(samples[i]) for i in range(3 * length)]
    for epoch in range(3):
        part = drawn[epoch * length : (epoch + 1) * length]
        assert sorted(part) == [(epoch, i) for i in range(length)]


@settings(max_examples=6, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0.1, 1)), min_size=2, max_size=4),
    st.integers(0, 2**31 - 1),
    st.integers(1, 4),
)
def test_shares_are_those_stated_on_every_host(parts, seed, hosts):
    total = sum(weight for _, weight in parts)
    mixture = make_mixture(*((n, weight / total) for n, weight in parts))
    samples, per_host = mixture.samples(seed), 150
    num = hosts * per_host
    sources = np.array(
        [
            "abcdef".index(mixture.path_of(mixture.split(samples[i])[1])[0])
            for i in range(num)
        ]
    )
    for k, weight in enumerate(mixture.weights):
        for host in range(hosts):
            share = (sources[host::hosts] == k).mean()
            # Six standard deviations of independent draws.
            assert abs(share - weight) < 6 * np.sqrt(weight * (1 - weight) / per_host)


@pytest.fixture
def window(monkeypatch):
    """Use a short window of shuffled turns."""
    monkeypatch.setattr(records_module, "_WINDOW", 300)
    return 300


def test_shares_are_exact_over_a_window(window):
    mixture = make_mixture((7, 0.335), (3, 0.1), (30, 0.565))
    samples = mixture.samples(1)
    names = [
        mixture.path_of(mixture.split(samples[i])[1])[0] for i in range(2 * window)
    ]
    for part in (names[:window], names[window:]):
        drawn = Counter(part)
        for name, weight in zip("abc", mixture.weights, strict=True):
            assert abs(drawn[name] - window * weight) <= 2


def test_a_mixture_goes_through_each_source_in_epochs(window):
    mixture = make_mixture((5, 0.25), (11, 0.75))
    samples = mixture.samples(3)
    drawn = [mixture.split(samples[i]) for i in range(2 * window)]
    assert len(set(drawn)) == len(drawn)  # no record twice in an epoch
    for record in range(5):
        epochs = sorted(epoch for epoch, index in drawn if index == record)
        assert epochs == list(range(len(epochs)))


def test_seeds_decide_and_places_are_random_access():
    mixture = make_mixture((7, 0.5), (9, 0.5))
    first, again, other = (mixture.samples(seed) for seed in (0, 0, 1))
    far = 10**12 + 17
    assert [first[i] for i in range(50)] == [again[i] for i in range(50)]
    assert first[far] == again[far]
    assert [first[i] for i in range(50)] != [other[i] for i in range(50)]
    assert isinstance(first, grain.MapDataset)


def test_digest_tells_sources_order_and_weights():
    digests = {
        make_mixture(*parts).digest()
        for parts in (
            [(7, 0.5), (9, 0.5)],
            [(9, 0.5), (7, 0.5)],
            [(7, 0.4), (9, 0.6)],
            [(7, 1.0)],
        )
    }
    assert len(digests) == 4
    parts = [(7, 0.5), (9, 0.5)]
    assert make_mixture(*parts).digest() == make_mixture(*parts).digest()
