"""Whole runs under tensor, context and pipeline parallelism: curves, validation, checkpoints and data as in one process."""

import functools
import shutil
from collections.abc import Callable, Iterable

import pytest
import torch

from tests.distributed.cases import build_parameter
from tests.distributed.training import Account, Run, assert_equal_states, assert_succeeded

Starter = Callable[..., tuple[Run, list[Account]]]

COMMON = ["--model.flavor=deep", "--training.global_batch_size=4", "--debug.seed=3", "--checkpoint.enable"]
COMMON += ["--validation.enable"]
TP = "--parallelism.tensor_parallel_degree=2"
CP = "--parallelism.context_parallel_degree=2"
PP = "--parallelism.pipeline_parallel_degree=2"
SCHEDULE = "--parallelism.pipeline_parallel_schedule="

SPREAD = {
    "tp": (2, [TP]),
    "cp": (2, [CP]),
    "cp-ulysses": (2, [CP, "--parallelism.context_parallel_method=ulysses"]),
    "pp": (2, [PP]),
    "pp-zbv": (2, [PP, f"{SCHEDULE}ZBVZeroBubble", "--training.local_batch_size=4"]),
    "fsdp-tp-pp": (8, [TP, PP, f"{SCHEDULE}Interleaved1F1B"]),
    "fsdp-cp-compiled": (4, [CP, "--compile.enable", "--compile.backend=aot_eager"]),
}


def mark(names: Iterable[str], *exhaustive: str) -> list:
    """Return the names as parameters, of which some are costly and near to others."""
    return [build_parameter(name, name, exhaustive=name in exhaustive) for name in names]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list]:
    """The run of one process, whose token files the others share."""
    run = Run(tmp_path_factory.mktemp("parallel"))
    return run, assert_succeeded(run(1, *COMMON, keep=(7,)))


@pytest.fixture
def run(one_process: tuple[Run, list], request: pytest.FixtureRequest) -> Run:
    return one_process[0].clone("".join(c if c.isalnum() else "_" for c in request.node.name))


@pytest.fixture(scope="module")
def start(one_process: tuple[Run, list]) -> Starter:
    """Whole runs of `SPREAD` and `EXPERTS_SPREAD`, each done once: other runs go on from their checkpoints."""

    @functools.cache
    def start(world_size: int, *options: str) -> tuple[Run, list]:
        run = one_process[0].clone(f"whole_{start.cache_info().misses}")
        return run, assert_succeeded(run(world_size, *options, keep=(7,)))

    return start


def go_on(whole: Run, run: Run, world_size: int, *options: str) -> list[Account]:
    """Take the last three steps after a checkpoint of another run."""
    shutil.copytree(whole.checkpoints / "step-4", run.checkpoints / "step-4")
    accounts = assert_succeeded(run(world_size, *options, keep=(7,)))
    assert sorted(accounts[0].sequences) == [5, 6, 7]
    return accounts


def spread(name: str) -> tuple:
    world_size, options = SPREAD[name]
    return world_size, *COMMON, *options


def assert_trained_alike(accounts: list[Account], reference: Account) -> None:
    trained = {name: value for account in accounts for name, value in account.states[7].items()}
    assert trained.keys() == reference.states[7].keys()
    for parameter, expected in reference.states[7].items():
        torch.testing.assert_close(trained[parameter], expected, rtol=1e-3, atol=1e-5, msg=parameter)


@pytest.mark.parametrize("name", mark(SPREAD, "tp", "cp-ulysses", "fsdp-cp-compiled"))
def test_run_is_that_of_one_process(one_process: tuple[Run, list], start: Starter, name: str) -> None:
    whole, (reference,) = one_process
    run, accounts = start(*spread(name))
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("lr", 1e-7), ("tokens_seen", 0)):
        assert run.curve(key) == pytest.approx(whole.curve(key), rel=tolerance), key
    validation = [[line["loss"] for line in it.lines("validation")] for it in (run, whole)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)
    seen = {step: {row for account in accounts for row in account.sequences[step]} for step in reference.sequences}
    assert seen == {step: set(rows) for step, rows in reference.sequences.items()}
    assert_trained_alike(accounts, reference)


@pytest.mark.parametrize("name", mark(["fsdp-tp-pp", "cp", "pp-zbv"], "fsdp-tp-pp"))
def test_resume_is_bitwise(start: Starter, run: Run, name: str) -> None:
    whole, expected = start(*spread(name))
    accounts = go_on(whole, run, *spread(name))
    assert run.curve() == whole.curve()[4:]
    for account, reference in zip(accounts, expected, strict=True):
        assert_equal_states(account, reference, 7)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("fsdp-tp-pp", "cp"),
        ("cp", "pp-zbv"),
        pytest.param("tp", "fsdp-tp-pp", marks=pytest.mark.exhaustive),
    ],
)
def test_checkpoint_goes_on_under_other_parallelisms(
    one_process: tuple[Run, list], start: Starter, run: Run, before: str, after: str
) -> None:
    whole, (reference,) = one_process
    accounts = go_on(start(*spread(before))[0], run, *spread(after))
    assert run.curve() == pytest.approx(whole.curve()[4:], rel=1e-5)
    assert_trained_alike(accounts, reference)


# --- mixtures of experts ---

EXPERTS = [
    *("--model.name=bloomlet_experts", "--model.mtp_depth=1", "--model.balance_loss_alpha=0.01"),
    *("--debug.seed=3", "--checkpoint.enable", "--validation.enable"),
]
EXPERTS_SPREAD = {
    "fsdp": (2, []),
    "hsdp": (4, ["--parallelism.data_parallel_replicate_degree=2"]),
    "cp": (2, [CP]),
    "pp": (2, [PP, "--training.local_batch_size=4"]),
    "ep": (4, ["--parallelism.expert_parallel_degree=2"]),
    "tp-ep": (2, ["--parallelism.tensor_parallel_degree=2", "--parallelism.expert_parallel_degree=2"]),
    "recomputed": (1, ["--activation_checkpoint.mode=full"]),
    "fsdp-compiled": (2, ["--compile.enable", "--compile.backend=aot_eager"]),
}


def spread_experts(name: str) -> tuple:
    world_size, options = EXPERTS_SPREAD[name]
    return world_size, *EXPERTS, *options


@pytest.fixture(scope="module")
def one_process_with_experts(one_process: tuple[Run, list]) -> Run:
    run = one_process[0].clone("experts")
    assert_succeeded(run(1, *EXPERTS))
    return run


@pytest.mark.parametrize("name", mark(EXPERTS_SPREAD, "hsdp", "cp", "ep", "tp-ep", "recomputed", "fsdp-compiled"))
def test_run_with_experts_is_that_of_one_process(one_process_with_experts: Run, start: Starter, name: str) -> None:
    whole = one_process_with_experts
    run, _ = start(*spread_experts(name))
    assert run.curve() == pytest.approx(whole.curve(), rel=1e-5)
    assert run.curve("grad_norm") == pytest.approx(whole.curve("grad_norm"), rel=1e-4)
    validation = [[line["loss"] for line in it.lines("validation")] for it in (run, whole)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)
    here = [name for name in run.lines()[0] if name.startswith("experts/layers.")]
    assert here
    for key in (*here, "experts/max_over_mean", "experts/entropy", "mtp/main_loss", "mtp/loss_1"):
        assert run.curve(key) == pytest.approx(whole.curve(key), rel=1e-5), key
    assert run.curve("experts/dropped") == [0.0] * 7


@pytest.mark.parametrize("name", mark(["pp", "ep"], "ep"))
def test_run_with_experts_resumes_bitwise(start: Starter, run: Run, name: str) -> None:
    """The last stage's copy of the embeddings is no part of the checkpoint; experts on several ranks are."""
    whole, expected = start(*spread_experts(name))
    accounts = go_on(whole, run, *spread_experts(name))
    for key in ("loss", "mtp/loss_1"):
        assert run.curve(key) == whole.curve(key)[4:]
    for account, reference in zip(accounts, expected, strict=True):
        assert_equal_states(account, reference, 7)


@pytest.mark.parametrize("name", mark(["fsdp", "ep"], "ep"))
def test_experts_and_their_bias_go_on_on_two_ranks(
    one_process_with_experts: Run, start: Starter, run: Run, name: str
) -> None:
    """Without the bias of the checkpoint tokens would meet other experts."""
    whole, key = one_process_with_experts, "experts/layers.2/max_over_mean"
    _, *options = spread_experts(name)
    go_on(start(*spread_experts(name))[0], run, 2, *options)
    assert run.curve() == pytest.approx(whole.curve()[4:], rel=1e-5)
    assert run.curve(key) == pytest.approx(whole.curve(key)[4:], rel=1e-5)
    assert len(set(whole.curve(key))) > 1
