import copy
import json
import time

import numpy as np
import pytest
import torch

from trainer.components.data.batch_loader import BatchShape
from trainer.components.data.loader import DataLoader, Source
from trainer.components.data.packing import ConcatPacking
from trainer.components.data.token_files import write_token_dataset
from trainer.config.schema_training import DataloaderConfig

SEQ_LEN = 8
IGNORE = -100


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """Two data sets in which every token is unique: 1..4999 and 5001..6500."""
    root = tmp_path_factory.mktemp("data")

    def make(name, low, high):
        rng = np.random.default_rng(0)
        cuts = np.sort(rng.choice(np.arange(low + 1, high), 200, replace=False))
        documents = np.split(np.arange(low, high), cuts - low)
        return write_token_dataset(
            root / name, documents, vocab_size=10_000, tokenizer_fingerprint="t", shard_tokens=1000
        )

    return make("a", 1, 5000), make("b", 5001, 6500)


class LoaderFactory:
    def __init__(self, datasets):
        self.datasets = datasets
        self.made = []

    def __call__(
        self, *, n_sources=1, weights=(0.7, 0.3), local=4, total=16, rank=0, degree=1, workers=1, tail=False, **more
    ):
        document_mask = more.pop("document_mask", True)
        seq_len = more.pop("seq_len", SEQ_LEN)
        sources = [
            Source(
                name,
                ConcatPacking(dataset, seq_len=seq_len, document_mask=document_mask, keep_tail=tail),
                dataset.fingerprint,
                weight,
            )
            for name, dataset, weight in zip("ab"[:n_sources], self.datasets, weights, strict=False)
        ]
        arguments = {"seed": 0, "shuffle": True, "packing": "concat", **more}
        loader = DataLoader(
            sources,
            shape=BatchShape(local, total, seq_len, rank, degree),
            section=DataloaderConfig(num_workers=workers, prefetch_factor=2),
            **arguments,
        )
        self.made.append(loader)
        return loader


@pytest.fixture
def make_loader(datasets):
    factory = LoaderFactory(datasets)
    yield factory
    for loader in factory.made:
        loader.close()


def read_steps(loaders, steps):
    """Sequences (first token) of each step, over all ranks, and all tensors in the order handed out."""
    sets = []
    for _ in range(steps):
        first = []
        for _ in range(loaders[0].microbatches_per_step):
            for loader in loaders:
                first += loader.next_batch()["tokens"][:, 0].tolist()
        sets.append(first)
    return sets


def ranks(make_loader, degree, **more):
    return [make_loader(rank=rank, degree=degree, **more) for rank in range(degree)]


@pytest.mark.parametrize("n_sources", [1, 2])
@pytest.mark.parametrize(
    ("degree", "local", "workers"), [(1, 16, 0), (1, 1, 3), (2, 4, 1), (4, 4, 2), (4, 2, 5), (16, 1, 1)]
)
def test_order_is_the_same_for_any_ranks_microbatches_and_threads(make_loader, n_sources, degree, local, workers):
    reference = read_steps([make_loader(n_sources=n_sources)], 12)
    loaders = ranks(make_loader, degree, local=local, workers=workers, n_sources=n_sources)
    assert read_steps(loaders, 12) == reference


def test_each_sequence_comes_once_an_epoch_across_the_border(make_loader):
    loader = make_loader(local=20, total=20)
    n = loader.n_sequences
    assert n % 20, "the epoch must end inside a batch"
    first = [value for step in read_steps([loader], 2 * n // 20 + 1) for value in step]
    everything = sorted(range(1, 1 + n * SEQ_LEN, SEQ_LEN))
    assert sorted(first[:n]) == everything
    assert sorted(first[n : 2 * n]) == everything
    assert first[:n] != first[n : 2 * n]


def test_without_shuffle_batches_follow_the_data(make_loader):
    first = [value for step in read_steps([make_loader(shuffle=False)], 3) for value in step]
    assert first == list(range(1, 1 + 48 * SEQ_LEN, SEQ_LEN))


@pytest.mark.parametrize("document_mask", [False, True])
def test_batch_has_the_promised_tensors(make_loader, document_mask):
    batch = make_loader(n_sources=2, document_mask=document_mask).next_batch()
    names = {"tokens", "labels", "positions"} if document_mask else {"tokens", "labels"}
    assert set(batch) == names
    for tensor in batch.values():
        assert tensor.shape == (4, SEQ_LEN)
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()
    real = batch["labels"] != IGNORE
    assert torch.equal(batch["labels"][real], batch["tokens"][real] + 1)


def test_batch_of_a_step_equals_what_was_handed_out(make_loader):
    loader, other = make_loader(n_sources=2), make_loader(n_sources=2, workers=3)
    handed = [loader.next_batch() for _ in range(12)]
    for number in (11, 0, 5):
        batch = other.batch(number // 4, number % 4)
        assert all(torch.equal(batch[name], handed[number][name]) for name in batch)


@pytest.mark.parametrize("n_sources", [1, 2])
def test_resume_is_exact_twice_and_with_other_ranks(make_loader, n_sources):
    whole = read_steps([make_loader(n_sources=n_sources)], 90)
    loaders = [make_loader(n_sources=n_sources)]
    got, state = [], None
    for degree, local, workers, steps in [(1, 4, 1, 30), (4, 2, 3, 7), (2, 8, 0, 3), (1, 16, 2, 50)]:
        loaders = ranks(make_loader, degree, local=local, workers=workers, n_sources=n_sources)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(copy.deepcopy(state))
        got += read_steps(loaders, steps)
        states = [loader.state_dict() for loader in loaders]
        assert all(other == states[0] for other in states), "the state is the same on all ranks"
        state = json.loads(json.dumps(states[0]))
        assert state == states[0], "the state survives JSON"
    assert got == whole


def test_resume_in_the_middle_of_a_step(make_loader):
    reference, loader = make_loader(), make_loader()
    for _ in range(6):
        reference.next_batch()
        loader.next_batch()
    resumed = make_loader()
    resumed.load_state_dict(loader.state_dict())
    assert torch.equal(resumed.next_batch()["tokens"], reference.next_batch()["tokens"])


def test_state_is_that_of_batches_handed_out(make_loader):
    loader = make_loader(workers=4)
    loader.next_batch()
    deadline = time.monotonic() + 10
    while len(loader._prefetcher._futures) < 8 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert loader.state_dict()["sequences"] == 4


def test_load_state_dict_rewinds_a_running_loader(make_loader):
    loader = make_loader()
    state = loader.state_dict()
    first = loader.next_batch()["tokens"]
    loader.next_batch()
    loader.load_state_dict(state)
    assert torch.equal(loader.next_batch()["tokens"], first)


def test_changed_global_batch_skips_and_repeats_nothing(make_loader, caplog):
    loader = make_loader(total=16)
    whole = [value for step in read_steps([make_loader(total=16)], 5) for value in step]
    got = [value for step in read_steps([loader], 2) for value in step]
    resumed = make_loader(total=48, local=8)
    resumed.load_state_dict(loader.state_dict())
    got += [value for step in read_steps([resumed], 1) for value in step]
    assert got == whole
    assert "global_batch_size was 16 and is 48" in caplog.text


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "debug.seed: 0 in the checkpoint, 1 now"),
        ({"shuffle": False}, "data.shuffle: True in the checkpoint, False now"),
        ({"seq_len": 16}, "training.seq_len: 8 in the checkpoint, 16 now"),
        ({"packing": "best_fit"}, "data.packing: concat in the checkpoint, best_fit now"),
        ({"weights": (0.5, 0.5)}, "weights in data.sources"),
        ({"n_sources": 1}, "the data themselves"),
    ],
)
def test_other_order_is_refused_by_name(make_loader, change, named):
    state = make_loader(n_sources=2).state_dict()
    changed = make_loader(**{"n_sources": 2, **change})
    with pytest.raises(ValueError, match=r"checkpoint.exclude_from_loading") as caught:
        changed.load_state_dict(state)
    assert named in str(caught.value)
    if len(change) == 1 and "n_sources" not in change:
        assert str(caught.value).count(" now") == 1, "nothing else is said to have changed"


def test_foreign_state_is_refused(make_loader):
    with pytest.raises(ValueError, match=r"data.streaming"):
        make_loader().load_state_dict({"position": {}})


def test_global_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"training.global_batch_size 10 is not a multiple"):
        BatchShape(local_batch_size=4, global_batch_size=10, seq_len=8)


class Failing:
    """Packing that fails at one sequence."""

    def __init__(self, packing, bad):
        self.packing, self.bad = packing, bad
        self.n_sequences, self.report = packing.n_sequences, packing.report

    def fetch(self, indices):
        if self.bad in indices:
            raise OSError("disk on fire")
        return self.packing.fetch(indices)


@pytest.mark.parametrize("workers", [1, 3])
def test_error_in_a_thread_is_raised_in_its_turn(make_loader, workers):
    loader = make_loader(shuffle=False, workers=workers)
    loader._packings[0] = Failing(loader._packings[0], bad=13)
    for _ in range(3):
        loader.next_batch()
    for _ in range(2):  # it is not skipped by asking again
        with pytest.raises(OSError, match=r"disk on fire"):
            loader.next_batch()
    assert loader.state_dict()["sequences"] == 12
    loader._packings[0].bad = -1
    assert loader.next_batch()["tokens"][0, 0] == 1 + 12 * SEQ_LEN


class Slow(Failing):
    def fetch(self, indices):
        time.sleep(0.05)
        return self.packing.fetch(indices)


def test_waiting_is_measured_and_reset(make_loader):
    loader = make_loader()
    loader._packings[0] = Slow(loader._packings[0], None)
    loader.next_batch()
    assert loader.take_wait_seconds() > 0.04
    assert loader.take_wait_seconds() == 0


def test_close_ends_the_threads_and_may_be_repeated(make_loader):
    loader = make_loader(workers=3)
    first = loader.next_batch()
    threads = list(loader._prefetcher._executor._threads)
    loader.close()
    loader.close()
    assert not any(thread.is_alive() for thread in threads)
    assert not torch.equal(loader.next_batch()["tokens"], first["tokens"]), "it goes on after the batches handed out"


@pytest.mark.parametrize("degree", [1, 2, 4])
@pytest.mark.parametrize("local", [1, 4, 7])
def test_validation_counts_each_label_once_on_any_ranks(make_loader, degree, local):
    loaders = ranks(make_loader, degree, local=local, total=local * degree, n_sources=2, tail=True, document_mask=False)
    lengths, labels = set(), []
    for loader in loaders:
        batches = list(loader.epoch_batches())
        lengths.add(len(batches))
        assert len(batches) == loader.n_epoch_batches
        assert all(batch["tokens"].shape == (local, SEQ_LEN) for batch in batches)
        labels += [label for batch in batches for label in batch["labels"].flatten().tolist() if label != IGNORE]
    assert len(lengths) == 1
    assert sorted(labels) == [*range(2, 5000), *range(5002, 6500)]


def test_validation_stops_after_its_steps_and_can_be_repeated(make_loader):
    loader = make_loader(epoch_steps=3)
    loader.next_batch()
    state = loader.state_dict()
    first, second = (torch.cat([batch["tokens"] for batch in loader.epoch_batches()]) for _ in range(2))
    assert torch.equal(first, second)
    assert first[:, 0].tolist() == list(range(1, 1 + 12 * SEQ_LEN, SEQ_LEN))
    assert loader.state_dict() == state


def test_validation_left_early_ends_its_threads(make_loader):
    batches = make_loader(workers=2).epoch_batches()
    next(batches)
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)


def test_describe_and_locate_agree_with_what_was_read(make_loader):
    loader = make_loader(n_sources=2, document_mask=False)
    steps = read_steps([loader], 3)
    position = loader.position()
    assert position == {"first_sequence": 48, "sequences": 16}
    located = loader.locate(0, 48)
    from_a = [value < 5001 for step in steps for value in step]
    assert [entry["source"] == "a" for entry in located] == from_a
    progress = loader.describe()
    assert progress == loader.describe(3)
    assert progress["a"].sequences == sum(from_a)
    assert progress["a"].tokens + progress["b"].tokens == 48 * SEQ_LEN
    for entry, value in zip(located, (v for step in steps for v in step), strict=True):
        assert (value - (1 if entry["source"] == "a" else 5001)) // SEQ_LEN == entry["sequence"]
