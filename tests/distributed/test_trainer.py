"""Whole runs of a tiny Llama that a user's own module brings along, with data whose second epoch begins in mid-run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.distributed.harness import run_distributed
from tests.distributed.training import Account, Fault, Run, assert_equal_states, assert_succeeded, sequences_by_step

SEEDED = "--debug.seed=3"
CHECKPOINTS = "--checkpoint.enable"


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Run:
    """A run whose token files the others share."""
    return Run(tmp_path_factory.mktemp("training"))


@pytest.fixture
def run(cache: Run, request) -> Run:
    return cache.clone("".join(c if c.isalnum() else "_" for c in request.node.name))


# --- one run ---


def test_run_writes_metrics_curves_and_summary_and_learns(run: Run) -> None:
    overrides = ["--training.steps=25", "--lr_scheduler.total_steps=25", "--metrics.enable_tensorboard", CHECKPOINTS]
    (account,) = assert_succeeded(run(1, *overrides, "--validation.enable", "--validation.freq=10"))
    losses = run.curve()
    assert losses[0] == pytest.approx(5.6, abs=0.8), "about ln(259)"
    assert losses[-1] < losses[0] - 1.5
    needed = {"step", "loss", "grad_norm", "lr", "tokens_per_second", "mfu", "memory_gib", "data_wait", "tokens_seen"}
    for step, line in enumerate(run.lines(), start=1):
        assert needed <= line.keys()
        assert line["step"] == step
        assert line["tokens_seen"] == step * 8 * 64
        assert line["tokens_per_second"] > 0
        assert 0 <= line["data_wait"] <= 1
    assert [line["step"] for line in run.lines("validation")] == [10, 20, 25]
    saves = run.lines("checkpoint")
    assert [line["saved_step"] for line in saves] == [line["step"] for line in saves] == [*range(2, 25, 2), 25]
    assert all(0 < line["stall_seconds"] <= line["seconds"] and line["gib"] > 0 for line in saves)
    elapsed = run.curve("elapsed_seconds")
    assert 0 < elapsed[0] < elapsed[-1]
    (end,) = run.lines("end")
    assert (end["first_loss"], end["last_loss"], end["tokens_seen"]) == (losses[0], losses[-1], 25 * 512)
    assert list((run.dump_folder / "tb").glob("events.out.tfevents.*"))
    for words in ("trained 25 steps", f"{losses[0]:.4f} -> {losses[-1]:.4f}", "12,800 seen", "tokens/s per device"):
        assert words in account.stdout
    assert f"checkpoint  {run.checkpoints}" in account.stdout
    assert "metrics.jsonl" in account.stdout
    epoch = {row for step in (1, 2, 3, 4) for row in account.sequences[step]}
    assert len(epoch) == 32, "no sequence comes twice in an epoch"
    assert set(account.sequences[5]) & epoch, "the second epoch began"


@pytest.mark.parametrize(
    "overrides",
    [
        ["--optimizer.name=Muon", "--optimizer.muon.lr=0.02"],
        ["--optimizer.name=Momentum", "--optimizer.lr=0.3", "--training.max_norm=0"],  # the user's
        pytest.param(
            ["--optimizer.name=AdamW", "--optimizer.implementation=foreach", "--optimizer.no_decay", "*norm*"],
            marks=pytest.mark.exhaustive,
        ),
        ["--optimizer.state_dtype=float8", "--training.gradient_wire_dtype=float8"],
    ],
    ids=lambda words: words[0].partition("=")[2],
)
def test_optimizer_trains_and_resumes_exactly(run: Run, overrides: list[str]) -> None:
    overrides += ["--training.steps=12", "--lr_scheduler.total_steps=12", CHECKPOINTS, "--checkpoint.interval=6"]
    accounts = assert_succeeded(run(2, *overrides, keep=(12,)))
    whole = run.curve()
    assert whole[-1] < whole[0] - 0.3
    shutil.rmtree(run.checkpoints / "step-12")
    again = assert_succeeded(run(2, *overrides, keep=(12,)))
    assert sorted(again[0].sequences) == [*range(7, 13)]
    assert run.curve() == whole
    assert_equal_states(again[0], accounts[0], 12)


# --- resume ---

VALIDATION = ["--validation.enable"]
RECOMPUTATION = ["--activation_checkpoint.mode=full"]
COMPILATION = ["--compile.enable", "--compile.backend=aot_eager"]


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        pytest.param(1, VALIDATION, id="one-sync"),
        pytest.param(1, ["--checkpoint.async_mode=async", *VALIDATION, *RECOMPUTATION], id="one-async"),
        pytest.param(2, ["--checkpoint.async_mode=async_with_pinned_mem", *VALIDATION], id="two-staged"),
        pytest.param(
            2,
            ["--checkpoint.async_mode=async", *RECOMPUTATION, *COMPILATION],
            id="two-async-compiled",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            2,
            ["--parallelism.data_parallel_replicate_degree=2", "--activation_checkpoint.mode=selective", *VALIDATION],
            id="two-ddp-sync",
        ),
    ],
)
def test_resume_is_bitwise_twice_in_a_row(run: Run, world_size: int, options: list[str]) -> None:
    """With accumulation, and an epoch that ends within step 5. The last checkpoint is lost each time."""
    options = [*options, CHECKPOINTS, SEEDED]
    whole = run.clone("whole")
    expected = assert_succeeded(whole(world_size, *options, keep=(7,)))
    shutil.copytree(whole.checkpoints / "step-2", run.checkpoints / "step-2")
    for steps, resumed_from in ((5, 2), (7, 4)):
        accounts = assert_succeeded(run(world_size, *options, f"--training.steps={steps}", keep=(7,)))
        assert sorted(accounts[0].sequences) == [*range(resumed_from + 1, steps + 1)]
        for account, reference in zip(accounts, expected, strict=True):
            assert account.sequences.items() <= reference.sequences.items()
        if steps < 7:
            shutil.rmtree(run.checkpoints / f"step-{steps}")
    assert [line["step"] for line in run.lines("resume")] == [2, 4]
    for key in ("loss", "grad_norm", "lr", "tokens_seen"):
        assert run.curve(key) == whole.curve(key)[2:]
    assert [line["loss"] for line in run.lines("validation")[-1:]] == [
        line["loss"] for line in whole.lines("validation")[-1:]
    ]
    for account, reference in zip(accounts, expected, strict=True):
        assert_equal_states(account, reference, 7)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 4)])
def test_resume_with_other_ranks_keeps_data_and_loss(run: Run, before: int, after: int) -> None:
    whole = run.clone("whole")
    expected = assert_succeeded(whole(before, CHECKPOINTS, "--checkpoint.interval=3"))
    shutil.copytree(whole.checkpoints / "step-3", run.checkpoints / "step-3")
    accounts = assert_succeeded(run(after, CHECKPOINTS, "--checkpoint.interval=100"))
    actual = sequences_by_step(accounts)
    assert sorted(actual) == [4, 5, 6, 7]
    assert actual.items() <= sequences_by_step(expected).items()
    assert run.curve() == pytest.approx(whole.curve()[3:], rel=1e-5)
    assert run.curve("tokens_seen") == whole.curve("tokens_seen")[3:]


def test_run_with_more_steps_goes_on(run: Run) -> None:
    assert_succeeded(run(1, CHECKPOINTS, "--training.steps=3"))
    (done,) = assert_succeeded(run(1, CHECKPOINTS, "--training.steps=3"))
    assert not done.sequences, "there was nothing left to train"
    (account,) = assert_succeeded(run(1, CHECKPOINTS, "--training.steps=5"))
    assert sorted(account.sequences) == [4, 5]
    assert [line["step"] for line in run.lines()] == [1, 2, 3, 4, 5]
    elapsed = run.curve("elapsed_seconds")
    assert elapsed == sorted(elapsed), "it goes on where it stopped"


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_full_disk_is_an_alarm_in_the_metrics_and_training_goes_on(run: Run, accumulated, mode: str) -> None:
    options = [CHECKPOINTS, SEEDED, f"--checkpoint.async_mode={mode}", "--checkpoint.max_failed_saves=2"]
    assert_succeeded(run(1, *options, fault=Fault((), full_disk=(2, 4))))
    assert [line["saved_step"] for line in run.lines("checkpoint_failed")] == [2, 4]
    assert all("No space left on device" in line["error"] for line in run.lines("checkpoint_failed"))
    assert [line["saved_step"] for line in run.lines("checkpoint")] == [6, 7]
    assert run.curve() == accumulated[0].curve()
    (account,) = run(1, *options, "--training.steps=9", "--lr_scheduler.total_steps=7", fault=Fault((), full_disk=(9,)))
    assert "It was the last one of the run" in account.error
    assert [line["saved_step"] for line in run.lines("checkpoint_failed")] == [2, 4, 9]


def test_seed_checkpoint_gives_its_weights_to_another_run(run: Run) -> None:
    seeding = run.clone("seeding")
    assert_succeeded(seeding(1, CHECKPOINTS, "--checkpoint.create_seed_checkpoint", SEEDED))
    assert [path.name for path in seeding.checkpoints.iterdir()] == ["step-0"]
    whole = run.clone("whole")
    (expected,) = assert_succeeded(whole(1, SEEDED, "--training.steps=1", keep=(0,)))
    loading = [CHECKPOINTS, "--debug.seed=4", f"--checkpoint.initial_load_path={seeding.checkpoints / 'step-0'}"]
    accounts = assert_succeeded(run(2, *loading, "--training.steps=1", keep=(0,)))
    for account in accounts:
        assert_equal_states(account, expected, 0)
    other = run.clone("other")
    (different,) = assert_succeeded(other(1, "--debug.seed=4", "--training.steps=1", keep=(0,)))
    name = "layers.0.attention.wq.weight"
    assert not torch.equal(different.states[0][name], expected.states[0][name])


# --- any number of ranks ---


@pytest.fixture(scope="module")
def accumulated(cache: Run) -> tuple[Run, list[Account]]:
    """One process that takes four microbatches a step, without validation."""
    run = cache.clone("accumulated")
    return run, assert_succeeded(run(1, SEEDED, keep=(0, 7)))


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        pytest.param(2, [], id="fsdp2"),
        pytest.param(2, ["--parallelism.fsdp_accumulation=sharded"], id="fsdp2-sharded"),
        pytest.param(4, [], id="fsdp4"),
        pytest.param(4, ["--parallelism.data_parallel_replicate_degree=2"], id="hsdp4"),
        pytest.param(1, ["--training.local_batch_size=8"], id="one-microbatch"),
    ],
)
def test_ranks_and_microbatches_do_not_change_the_training(run: Run, accumulated, world_size, options) -> None:
    """Ranks and microbatches have different numbers of labels, so a mean of means would be off by far more."""
    reference, (expected,) = accumulated
    accounts = assert_succeeded(run(world_size, *options, SEEDED, keep=(7,)))
    if world_size > 1:
        assert all(len({account.valid_tokens[step] for account in accounts}) > 1 for step in (1, 3, 4))
    for step, valid in expected.valid_tokens.items():
        assert sum(account.valid_tokens[step] for account in accounts) == valid
    assert sequences_by_step(accounts) == sequences_by_step([expected])
    assert run.curve() == pytest.approx(reference.curve(), rel=1e-5)
    assert run.curve("grad_norm") == pytest.approx(reference.curve("grad_norm"), rel=1e-4)
    for name, value in expected.states[7].items():
        for account in accounts:
            assert (account.states[7][name] - value).norm() <= 1e-3 * value.norm(), name


def test_loss_is_the_mean_over_the_valid_labels_of_all_ranks(accumulated) -> None:
    run, (account,) = accumulated
    (expected,) = run_distributed(compute_mean_loss, 1, account.states[0], account.first_batches)
    assert len(account.first_batches) == 4
    assert run.curve()[0] == pytest.approx(expected, rel=1e-5)


def build_model(states: dict[str, torch.Tensor]) -> torch.nn.Module:
    from models.llama3.model import Transformer
    from tests.distributed.user_module import TINY

    model = Transformer(TINY)
    model.init_buffers("cpu")
    weights = {name: value for name, value in states.items() if not name.startswith("state.")}
    assert weights.keys() == dict(model.named_parameters()).keys()
    model.load_state_dict(weights, strict=False)
    return model


def compute_mean_loss(states: dict[str, torch.Tensor], batches: list[dict[str, torch.Tensor]]) -> float:
    from models.common.attention import build_document_mask

    whole = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    mask = build_document_mask(whole["positions"], device_type="cpu")
    with torch.no_grad():
        logits = build_model(states)(whole["tokens"], positions=whole["positions"], mask=mask)
    assert (whole["labels"] == -100).any()
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), whole["labels"].flatten(), ignore_index=-100).item()


# --- validation ---


@pytest.mark.parametrize(
    ("world_size", "options"), [(1, []), (2, []), (2, ["--parallelism.fsdp_reshard_after_forward=never"])]
)
def test_validation_leaves_training_alone_and_is_right(run: Run, accumulated, world_size, options) -> None:
    options = [*options, SEEDED]
    accounts = assert_succeeded(run(world_size, "--validation.enable", CHECKPOINTS, *options, keep=(7,)))
    if world_size == 1:
        assert run.curve() == accumulated[0].curve()
        assert_equal_states(accounts[0], accumulated[1][0], 7)
    else:
        without = run.clone("without")
        expected = assert_succeeded(without(world_size, *options, keep=(7,)))
        assert run.curve() == without.curve()
        assert_equal_states(accounts[0], expected[0], 7)
    lines = run.lines("validation")
    assert [line["step"] for line in lines] == [2, 4, 6, 7]
    (held_out_loss,) = run_distributed(compute_held_out_loss, 1, accounts[0].states[7])
    assert lines[-1]["loss"] == pytest.approx(held_out_loss, rel=1e-5)


def compute_held_out_loss(states: dict[str, torch.Tensor]) -> float:
    """The mean loss over the held-out documents, computed one document at a time.

    No attention and no label crosses a border of documents there, and positions restart: so packing must not matter.
    """
    from tests.distributed.user_module import write_notes

    model = build_model(states)
    total, count = 0.0, 0
    for text in write_notes(9, 2):
        ids = torch.tensor([[256, *text.encode(), 257]])
        for window in split_into_windows(ids, 64):
            with torch.no_grad():
                logits = model(window[:, :-1])
            labels = window[0, 1:]
            total += torch.nn.functional.cross_entropy(logits[0], labels, reduction="sum").item()
            count += len(labels)
    return total / count


def split_into_windows(ids: torch.Tensor, seq_len: int) -> list[torch.Tensor]:
    """Cut a document as packing does: neighbouring pieces share a token, so that every token is a label once."""
    length = ids.shape[1]
    return [ids[:, first : first + seq_len + 1] for first in range(0, length - 1, seq_len)]


# --- losses and gradients that are not finite ---


def read_record(run: Run) -> list[dict]:
    return [json.loads(line) for line in (run.dump_folder / "nonfinite.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_stop_policy_stops_all_ranks_before_an_update(run: Run, kind: str) -> None:
    """Step 4 is bad on one rank alone, and a checkpoint is due right after it; that of step 2 is still being written."""
    options = [CHECKPOINTS, "--checkpoint.async_mode=async"]
    accounts = run(2, *options, keep=(3, 4), fault=Fault((4,), kind, rank=1, save_seconds=1.5))
    for account in accounts:
        assert account.error.startswith("NonFiniteError: step 4: ")
        assert "nonfinite_policy" in account.error
        assert_equal_states_at(account, 3, 4)
    (record,) = read_record(run)
    assert record["step"] == 4
    assert record["batch"] == {"first_sequence": 24, "sequences": 8}
    assert (record["loss"] == "nan") is (kind == "loss")
    assert sorted(path.name for path in run.checkpoints.iterdir()) == ["step-2"]


def test_each_rank_of_a_stream_writes_down_its_own_place(run: Run, tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"words of {name}\n" * 2000)
    data = [
        "--data.streaming",
        "--data.packing=concat",
        "--training.dataset=text",
        f"--training.dataset_path={tmp_path}/*.txt",
    ]
    run(2, *data, "--validation.enable=false", "--checkpoint.enable=false", fault=Fault((2,), "loss", rank=1))
    files = set()
    for rank in range(2):
        (line,) = (run.dump_folder / f"nonfinite.rank_{rank}.jsonl").read_text().splitlines()
        record = json.loads(line)
        assert record["step"] == 2
        files.add(Path(record["batch"]["file"]).name)
    assert files == {"a.txt", "b.txt"}


def assert_equal_states_at(account: Account, before: int, after: int) -> None:
    changed = [n for n, value in account.states[after].items() if not torch.equal(value, account.states[before][n])]
    assert not changed


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        pytest.param(2, [CHECKPOINTS], id="fsdp-adamw"),
        pytest.param(2, ["--optimizer.name=Muon"], id="fsdp-muon"),
        pytest.param(2, ["--parallelism.data_parallel_replicate_degree=2", "--optimizer.name=Momentum"], id="ddp-own"),
        pytest.param(1, [CHECKPOINTS], id="one"),
    ],
)
def test_skip_policy_leaves_the_step_out_and_goes_on(run: Run, world_size: int, options: list[str]) -> None:
    """Step 7, the last one, is bad too, and is told all the same."""
    options = [*options, "--training.nonfinite_policy=skip"]
    fault = Fault(steps=(3, 4, 7), kind="gradient", rank=world_size - 1)
    accounts = assert_succeeded(run(world_size, *options, keep=(2, 3, 4, 5, 6, 7), fault=fault))
    for account in accounts:
        for before, after in ((2, 3), (3, 4), (6, 7)):
            assert_equal_states_at(account, before, after)
        name = "layers.0.attention.wq.weight"
        assert not torch.equal(account.states[5][name], account.states[4][name])
        assert all(value.isfinite().all() for value in account.states[7].values())
    assert [(line["step"], line["skipped"]) for line in run.lines("skip")] == [(3, 1), (4, 2), (7, 3)]
    assert [record["step"] for record in read_record(run)] == [3, 4, 7]
    assert [line["step"] for line in run.lines() if line["grad_norm"] is None] == [3, 4, 7]
    assert (run.checkpoints / "step-4").is_dir() is (CHECKPOINTS in options), (
        "it holds the weights of the last good step"
    )


def test_skip_policy_stops_after_too_many_in_a_row(run: Run) -> None:
    options = ["--training.nonfinite_policy=skip", "--training.nonfinite_max_skips=2", CHECKPOINTS]
    accounts = run(2, *options, fault=Fault(steps=(2, 4, 5, 6), rank=0))
    for account in accounts:
        assert account.error.startswith("NonFiniteError: step 6: ")
        assert "nonfinite_max_skips = 2" in account.error
    assert [line["step"] for line in run.lines("skip")] == [2, 4, 5]
    assert not (run.checkpoints / "step-6").exists()


def test_skipped_steps_are_counted_across_a_resume(run: Run) -> None:
    """A batch that fails again after each restart must not be skipped for ever."""
    options = ["--training.nonfinite_policy=skip", "--training.nonfinite_max_skips=2", CHECKPOINTS]
    assert_succeeded(run(1, *options, "--training.steps=4", fault=Fault(steps=(3, 4))))
    (account,) = run(1, *options, fault=Fault(steps=(5, 6)))
    assert account.error.startswith("NonFiniteError: step 5: ")
    assert "3 steps in a row were skipped" in account.error
    assert [line["skipped"] for line in run.lines("skip")] == [1, 2]


# --- configuration ---


def test_mistakes_are_told_once_for_all_ranks(run: Run) -> None:
    accounts = run(
        2, "--training.steps=none", "--optimizer.lr=-1", "--model.flavour=tiny", "--training.local_batch_size=3"
    )
    assert [account.exit_code for account in accounts] == [2, 2]
    first, second = accounts
    for words in ("training.steps", "optimizer.lr", "model.flavour", "training.global_batch_size"):
        assert words in first.stderr
    assert "Traceback" not in first.stderr
    assert second.stderr == second.stdout == ""
    assert not run.dump_folder.exists()
