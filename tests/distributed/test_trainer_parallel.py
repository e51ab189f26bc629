"""Whole runs under tensor, context and pipeline parallelism: curves, validation, checkpoints and data as in one process."""

import shutil

import pytest
import torch

from tests.distributed.training import Run, assert_equal_states, assert_succeeded

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


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, list]:
    """The run of one process, whose token files the others share."""
    run = Run(tmp_path_factory.mktemp("parallel"))
    return run, assert_succeeded(run(1, *COMMON, keep=(7,)))


@pytest.fixture
def run(one_process: tuple[Run, list], request: pytest.FixtureRequest) -> Run:
    return one_process[0].clone("".join(c if c.isalnum() else "_" for c in request.node.name))


@pytest.mark.parametrize("name", SPREAD)
def test_run_is_that_of_one_process(one_process: tuple[Run, list], run: Run, name: str) -> None:
    world_size, options = SPREAD[name]
    whole, (reference,) = one_process
    accounts = assert_succeeded(run(world_size, *COMMON, *options, keep=(7,)))
    for key, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4), ("lr", 1e-7), ("tokens_seen", 0)):
        assert run.curve(key) == pytest.approx(whole.curve(key), rel=tolerance), key
    validation = [[line["loss"] for line in it.lines("validation")] for it in (run, whole)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)
    seen = {step: {row for account in accounts for row in account.sequences[step]} for step in reference.sequences}
    assert seen == {step: set(rows) for step, rows in reference.sequences.items()}
    trained = {name: value for account in accounts for name, value in account.states[7].items()}
    assert trained.keys() == reference.states[7].keys()
    for parameter, expected in reference.states[7].items():
        torch.testing.assert_close(trained[parameter], expected, rtol=1e-3, atol=1e-5, msg=parameter)


@pytest.mark.parametrize("name", ["fsdp-tp-pp", "cp", "pp-zbv"])
def test_resume_is_bitwise(run: Run, name: str) -> None:
    world_size, options = SPREAD[name]
    expected = assert_succeeded(run(world_size, *COMMON, *options, keep=(7,)))
    curve = run.curve()
    for step in (6, 7):
        shutil.rmtree(run.checkpoints / f"step-{step}")
    accounts = assert_succeeded(run(world_size, *COMMON, *options, keep=(7,)))
    assert sorted(accounts[0].sequences) == [5, 6, 7]
    assert run.curve() == curve
    for account, reference in zip(accounts, expected, strict=True):
        assert_equal_states(account, reference, 7)


@pytest.mark.parametrize(("before", "after"), [("fsdp-tp-pp", "cp"), ("cp", "pp-zbv"), ("tp", "fsdp-tp-pp")])
def test_checkpoint_goes_on_under_other_parallelisms(
    one_process: tuple[Run, list], run: Run, before: str, after: str
) -> None:
    whole, (reference,) = one_process
    for name, steps in ((before, 4), (after, 7)):
        world_size, options = SPREAD[name]
        accounts = assert_succeeded(run(world_size, *COMMON, *options, f"--training.steps={steps}", keep=(7,)))
    assert sorted(accounts[0].sequences) == [5, 6, 7]
    assert run.curve() == pytest.approx(whole.curve(), rel=1e-5)
    trained = {name: value for account in accounts for name, value in account.states[7].items()}
    assert trained.keys() == reference.states[7].keys()
    for parameter, expected in reference.states[7].items():
        torch.testing.assert_close(trained[parameter], expected, rtol=1e-3, atol=1e-5, msg=parameter)


# --- mixtures of experts ---

EXPERTS = [
    *("--model.name=bloomlet_experts", "--model.mtp_depth=1", "--model.balance_loss_alpha=0.01"),
    *("--debug.seed=3", "--checkpoint.enable", "--validation.enable"),
]
EXPERTS_SPREAD = {
    "fsdp": (2, []),
    "hsdp": (4, ["--parallelism.data_parallel_replicate_degree=2"]),
    "cp": (2, [CP]),
    "pp": (2, [PP]),
    "ep": (4, ["--parallelism.expert_parallel_degree=2"]),
    "tp-ep": (2, ["--parallelism.tensor_parallel_degree=2", "--parallelism.expert_parallel_degree=2"]),
    "recomputed": (1, ["--activation_checkpoint.mode=full"]),
    "fsdp-compiled": (2, ["--compile.enable", "--compile.backend=aot_eager"]),
}


@pytest.fixture(scope="module")
def one_process_with_experts(one_process: tuple[Run, list]) -> Run:
    run = one_process[0].clone("experts")
    assert_succeeded(run(1, *EXPERTS))
    return run


@pytest.mark.parametrize("name", EXPERTS_SPREAD)
def test_run_with_experts_is_that_of_one_process(one_process_with_experts: Run, run: Run, name: str) -> None:
    world_size, options = EXPERTS_SPREAD[name]
    assert_succeeded(run(world_size, *EXPERTS, *options))
    whole = one_process_with_experts
    assert run.curve() == pytest.approx(whole.curve(), rel=1e-5)
    assert run.curve("grad_norm") == pytest.approx(whole.curve("grad_norm"), rel=1e-4)
    validation = [[line["loss"] for line in it.lines("validation")] for it in (run, whole)]
    assert validation[0] == pytest.approx(validation[1], rel=1e-5)
    here = [name for name in run.lines()[0] if name.startswith("experts/layers.")]
    assert here
    for key in (*here, "experts/max_over_mean", "experts/entropy", "mtp/main_loss", "mtp/loss_1"):
        assert run.curve(key) == pytest.approx(whole.curve(key), rel=1e-5), key
    assert run.curve("experts/dropped") == [0.0] * 7


def test_resume_with_multi_token_prediction_is_bitwise(one_process_with_experts: Run, run: Run) -> None:
    """The last stage's copy of the embeddings is no part of the checkpoint."""
    options = [*EXPERTS, PP, "--training.local_batch_size=4"]
    expected = assert_succeeded(run(2, *options, keep=(7,)))
    curves = [run.curve(), run.curve("mtp/loss_1")]
    assert curves[0] == pytest.approx(one_process_with_experts.curve(), rel=1e-5)
    for step in (6, 7):
        shutil.rmtree(run.checkpoints / f"step-{step}")
    accounts = assert_succeeded(run(2, *options, keep=(7,)))
    assert sorted(accounts[0].sequences) == [5, 6, 7]
    assert [run.curve(), run.curve("mtp/loss_1")] == curves
    for account, reference in zip(accounts, expected, strict=True):
        assert_equal_states(account, reference, 7)


def test_experts_bias_moves_and_is_resumed(one_process_with_experts: Run, run: Run) -> None:
    """Without the bias of the checkpoint tokens would meet other experts."""
    assert_succeeded(run(2, *EXPERTS, "--training.steps=4"))
    assert_succeeded(run(2, *EXPERTS))
    whole = one_process_with_experts
    assert run.curve() == pytest.approx(whole.curve(), rel=1e-5)
    key = "experts/layers.2/max_over_mean"
    assert run.curve(key) == pytest.approx(whole.curve(key), rel=1e-5)
    assert len(set(whole.curve(key))) > 1


def test_experts_on_several_ranks_resume_bitwise_and_on_fewer_ranks(one_process_with_experts: Run, run: Run) -> None:
    spread = [*EXPERTS, "--parallelism.expert_parallel_degree=4"]
    expected = assert_succeeded(run(4, *spread, keep=(7,)))
    curve = run.curve()
    for step in (6, 7):
        shutil.rmtree(run.checkpoints / f"step-{step}")
    accounts = assert_succeeded(run(4, *spread, keep=(7,)))
    assert sorted(accounts[0].sequences) == [5, 6, 7]
    assert run.curve() == curve
    for account, reference in zip(accounts, expected, strict=True):
        assert_equal_states(account, reference, 7)
    for step in (6, 7):
        shutil.rmtree(run.checkpoints / f"step-{step}")
    assert_succeeded(run(2, *EXPERTS, "--parallelism.expert_parallel_degree=2"))
    for key in ("loss", "experts/layers.2/max_over_mean"):
        assert run.curve(key) == pytest.approx(one_process_with_experts.curve(key), rel=1e-5), key
