import itertools
import threading
import time

import pytest
import torch

from trainer.components.data.prefetch import BackgroundIterator, Prefetcher, WaitClock, get_pin_device


def make_slow_first(number):
    time.sleep(0.03 if number % 3 == 0 else 0)
    return {"tokens": torch.tensor(number)}


@pytest.mark.parametrize("workers", [1, 4])
def test_prefetcher_keeps_the_order(workers):
    prefetcher = Prefetcher(make_slow_first, workers=workers, depth=6, count=20)
    assert [int(prefetcher.get()["tokens"]) for _ in range(20)] == list(range(20))
    prefetcher.close()


def test_prefetcher_stays_within_its_depth_and_count():
    made = []
    prefetcher = Prefetcher(lambda number: made.append(number) or {}, workers=2, depth=3, count=5)
    prefetcher.get()
    time.sleep(0.1)
    assert sorted(made) == [0, 1, 2, 3]
    for _ in range(4):
        prefetcher.get()
    prefetcher.close()
    assert sorted(made) == [0, 1, 2, 3, 4]
    with pytest.raises(AssertionError, match=r"all batches"):
        prefetcher.get()


def count_up(limit, log):
    def make(stop):
        for number in itertools.count():
            if stop.is_set() or number == limit:
                return
            log.append(number)
            yield number

    return make


def test_background_iterator_runs_ahead_within_its_depth_and_ends():
    log = []
    background = BackgroundIterator(count_up(6, log), depth=2)
    deadline = time.monotonic() + 10
    while len(log) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert log == [0, 1, 2], "two wait in the queue and one to be put there"
    assert [background.get() for _ in range(8)] == [0, 1, 2, 3, 4, 5, None, None]
    background.close()


def test_background_iterator_raises_after_the_items_before_the_error():
    def make(stop):
        yield 1
        raise OSError("gone")

    background = BackgroundIterator(make, depth=2)
    assert background.get() == 1
    for _ in range(2):
        with pytest.raises(OSError, match=r"gone"):
            background.get()
    background.close()


def test_background_iterator_closes_while_its_queue_is_full():
    background = BackgroundIterator(count_up(None, []), depth=1)
    background.get()
    background.close()
    assert not any(thread.name == "data-stream" for thread in threading.enumerate())


def test_wait_clock_adds_up_until_taken():
    clock = WaitClock()
    for _ in range(2):
        with clock:
            time.sleep(0.02)
    assert clock.take() >= 0.04
    assert clock.take() == 0


@pytest.mark.parametrize(("pin", "device"), [(True, "cpu"), (False, "cuda"), (False, "cpu")])
def test_nothing_is_pinned_without_need(pin, device):
    assert get_pin_device(pin_memory=pin, device_type=device) is None
