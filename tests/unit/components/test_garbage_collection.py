import gc
import logging
import weakref

import pytest
import torch

from trainer.components.garbage_collection import FULL_EVERY, GarbageCollection


class Node:
    """Something that refers to itself, so that only the collector frees it."""

    def __init__(self, payload=None):
        self.payload = payload
        self.me = self


@pytest.fixture(autouse=True)
def leave_collector_as_it_was():
    yield
    gc.unfreeze()
    gc.enable()


def drop_cycle(payload=None):
    node = Node(payload)
    return weakref.ref(node)


def test_step_collects_at_its_turn_and_not_before():
    collection = GarbageCollection(freq=3)
    assert not gc.isenabled()
    reference = drop_cycle()
    collection.step(1)
    collection.step(2)
    assert reference() is not None
    collection.step(3)
    assert reference() is None
    collection.close()
    assert gc.isenabled()


def test_step_frees_old_objects_by_a_full_pass_in_time():
    collection = GarbageCollection(freq=1)
    node = Node()
    reference = weakref.ref(node)
    collection.step(1)
    collection.step(2)  # survivors are in the oldest generation now
    del node
    turns = 2
    while reference() is not None:
        turns += 1
        collection.step(turns)
        assert turns <= FULL_EVERY
    assert turns == FULL_EVERY


def test_zero_freq_leaves_collection_to_python():
    collection = GarbageCollection(freq=0)
    assert gc.isenabled()
    reference = drop_cycle()
    collection.step(0)
    assert reference() is not None


def test_debug_reports_tensors_held_by_cycles_and_frees_them(caplog):
    collection = GarbageCollection(freq=1, debug=True)
    reference = drop_cycle(torch.zeros(250))
    with caplog.at_level(logging.INFO):
        collection.step(1)
    assert reference() is None
    assert not gc.garbage
    assert "held 1 tensors (1000 bytes)" in caplog.text
    assert "Node" in caplog.text


def test_negative_freq_is_refused():
    with pytest.raises(ValueError, match=r"training\.gc_freq = -1"):
        GarbageCollection(freq=-1)
