"""Parallelisms that do not go with each other or with the sizes of a batch, as far as no model is needed to know."""

import pytest

from trainer.config.manager import load_config
from trainer.config.validate import find_problems

TP = "parallelism.tensor_parallel_degree"
CP = "parallelism.context_parallel_degree"
PP = "parallelism.pipeline_parallel_degree"
REPLICATE = "parallelism.data_parallel_replicate_degree"
SHARD = "parallelism.data_parallel_shard_degree"
PREFETCH = "parallelism.fsdp_prefetch"
RESHARD = "parallelism.fsdp_reshard_after_forward"
METHOD = "parallelism.context_parallel_method"
BALANCER = "parallelism.context_parallel_load_balancer"
ROTATE = "parallelism.context_parallel_rotate_method"
ASYNC_TP = "parallelism.enable_async_tensor_parallel"


def find(settings, world_size=None):
    loaded = load_config([f"--{key}={value}" for key, value in settings.items()])
    assert [str(p) for p in loaded.problems] == []
    problems, warnings = find_problems(loaded.config, world_size=world_size)
    return [str(p) for p in problems], [str(w) for w in warnings]


@pytest.mark.parametrize(
    ("settings", "multiple", "remedy"),
    [
        ({TP: 8, "training.seq_len": 1020}, f"multiple of {TP} = 8,", "Use 1016 or 1024,"),
        ({TP: 8, "training.seq_len": 5}, f"multiple of {TP} = 8,", "Use 8,"),
        ({CP: 4, "training.seq_len": 1020}, "4 x 2 = 8", "Use 1016 or 1024,"),
        ({CP: 4, "training.seq_len": 1020, METHOD: "ring"}, f"({BALANCER} = headtail) = 4 x 2 = 8", "1016"),
        ({CP: 4, "training.seq_len": 1022, BALANCER: "none"}, f"multiple of {CP} = 4,", "Use 1020 or 1024,"),
        ({CP: 4, "training.seq_len": 1022, METHOD: "ulysses"}, f"multiple of {CP} = 4,", "Use 1020 or 1024,"),
        ({TP: 3, CP: 2, "training.seq_len": 1018}, f"{TP} x {CP} x 2 parts a rank", "Use 1008 or 1020,"),
        ({TP: 3, CP: 2, "training.seq_len": 1018}, "3 x 2 x 2 = 12,", "or other degrees"),
    ],
)
def test_sequence_that_ranks_cannot_share_is_refused(settings, multiple, remedy):
    (problem,), _ = find(settings)
    assert problem.startswith(f"training.seq_len = {settings['training.seq_len']}: must be a multiple of ")
    assert multiple in problem
    assert remedy in problem


@pytest.mark.parametrize(
    "settings",
    [
        {"training.seq_len": 1021},
        {TP: 8, "training.seq_len": 1024},
        {CP: 4, "training.seq_len": 1024},
        {CP: 4, "training.seq_len": 1020, BALANCER: "none"},
        {CP: 4, "training.seq_len": 1020, METHOD: "ulysses"},
        {TP: 3, CP: 2, "training.seq_len": 1020},
        {TP: 8, "validation.seq_len": 1021},
    ],
)
def test_sequence_that_ranks_share_is_in_order(settings):
    assert find(settings) == ([], [])


def test_length_of_validation_sequences_counts_when_there_are_any():
    (problem,), _ = find({TP: 8, "validation.enable": "true", "validation.seq_len": 1021})
    assert problem.startswith("validation.seq_len = 1021: must be a multiple of ")
    assert "Use 1016 or 1024," in problem


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({CP: 2, BALANCER: "ptrr"}, [f"{BALANCER} = ptrr", "headtail", "none"]),
        (
            {CP: 2, METHOD: "ring", "model.attn_mask_type": "block_causal"},
            [f"{METHOD} = ring", "model.attn_mask_type = block_causal", "Use allgather or ulysses"],
        ),
        ({TP: 2, ASYNC_TP: "true"}, [f"{ASYNC_TP} = true", "compile.enable = true", f"{ASYNC_TP} = false"]),
        (
            {TP: 2, ASYNC_TP: "true", "compile.enable": "true", "compile.components": "loss"},
            [f"{ASYNC_TP} = true", "model in compile.components"],
        ),
        (
            {TP: 2, ASYNC_TP: "true", "compile.enable": "true", "compile.backend": "aot_eager"},
            [f"{ASYNC_TP} = true", "compile.backend = aot_eager", "Set compile.backend = inductor"],
        ),
        (
            {TP: 2, "optimizer.name": "Muon", "training.enable_cpu_offload": "true"},
            ["optimizer.name = Muon", "training.enable_cpu_offload = true", TP, "Use AdamW"],
        ),
        (
            {PP: 2, "parallelism.fsdp_collectives": "copy_engine"},
            ["parallelism.fsdp_collectives = copy_engine", f"{PP} = 2", "Use nccl or auto"],
        ),
    ],
)
def test_parallelism_that_does_not_go_with_a_setting_is_refused(settings, expected):
    (problem,), _ = find(settings)
    for words in expected:
        assert words in problem


@pytest.mark.parametrize(
    "settings",
    [
        {CP: 2, BALANCER: "none"},
        {CP: 2, METHOD: "ulysses"},
        {CP: 2, METHOD: "ring"},
        {CP: 2, METHOD: "ring", ROTATE: "alltoall"},
        {CP: 2, METHOD: "ulysses", "model.attn_mask_type": "block_causal"},
        {CP: 2, "model.attn_mask_type": "block_causal"},
        {TP: 2, ASYNC_TP: "true", "compile.enable": "true"},
        {TP: 2, "parallelism.disable_loss_parallel": "true"},
        {TP: 2, "training.enable_cpu_offload": "true"},
        {CP: 2, PP: 2, "optimizer.name": "Muon", "training.enable_cpu_offload": "true"},
        {CP: 2, SHARD: 1, "parallelism.fsdp_collectives": "copy_engine"},
        {TP: 2, CP: 2, "parallelism.fsdp_collectives": "copy_engine"},
        {PP: 2, "parallelism.fsdp_collectives": "auto"},
        {PP: 2, "parallelism.fsdp_accumulation": "unsharded"},
        {PP: 2, "parallelism.fsdp_reshard_after_forward": "always", "parallelism.fsdp_prefetch": 2},
        {TP: 2, CP: 2, PP: 2},
    ],
)
def test_parallelisms_that_go_together_are_in_order(settings):
    assert find(settings) == ([], [])


@pytest.mark.parametrize(
    ("key", "value", "degree"),
    [
        (ASYNC_TP, "true", TP),
        ("parallelism.disable_loss_parallel", "true", TP),
        (METHOD, "ring", CP),
        (BALANCER, "none", CP),
        (BALANCER, "ptrr", CP),
        (ROTATE, "alltoall", CP),
        ("parallelism.pipeline_parallel_schedule", "GPipe", PP),
        ("parallelism.pipeline_parallel_schedule_csv", "schedule.csv", PP),
        ("parallelism.pipeline_parallel_microbatch_size", "2", PP),
        ("parallelism.pipeline_parallel_layers_per_stage", "2", PP),
        ("parallelism.pipeline_parallel_first_stage_less_layers", "1", PP),
        ("parallelism.pipeline_parallel_last_stage_less_layers", "1", PP),
        ("parallelism.module_fqns_per_model_part", '[["tok_embeddings"], ["norm"]]', PP),
    ],
)
def test_detail_of_a_parallelism_that_is_off_is_warned_about(key, value, degree):
    problems, (warning,) = find({key: value})
    assert problems == []
    assert warning.startswith(f"{key} = {value.replace(chr(34), chr(39))} has no effect: {degree} is 1")


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({CP: 2, ROTATE: "alltoall"}, ROTATE),
        ({CP: 2, METHOD: "ulysses", ROTATE: "alltoall"}, ROTATE),
        ({SHARD: 1, "parallelism.fsdp_collectives": "copy_engine"}, "parallelism.fsdp_collectives"),
        ({SHARD: 1, PREFETCH: 2}, PREFETCH),
        ({SHARD: 1, REPLICATE: 2, RESHARD: "always"}, RESHARD),
    ],
)
def test_setting_that_another_leaves_without_effect_is_warned_about(settings, key):
    problems, (warning,) = find(settings)
    assert problems == []
    assert warning.startswith(f"{key} = {settings[key]} has no effect: ")


def test_work_that_tensor_parallelism_repeats_is_warned_about():
    problems, (warning,) = find({TP: 2, "optimizer.name": "Muon"})
    assert problems == []
    assert warning.startswith(f"optimizer.name = Muon with {TP} = 2: ")
    assert find({CP: 2, "optimizer.name": "Muon"}) == ([], [])


@pytest.mark.parametrize("several", [{"training.global_batch_size": 64}, {PP: 2}])
def test_sums_over_microbatches_in_bfloat16_are_warned_about(several):
    settings = {"training.dtype": "bfloat16", **several}
    problems, (warning,) = find(settings)
    assert problems == []
    assert warning.startswith("training.dtype = bfloat16: ")
    assert "parallelism.fsdp_accumulation = unsharded" in warning
    assert find({**settings, "parallelism.fsdp_accumulation": "unsharded"}) == ([], [])
    assert find({"training.dtype": "bfloat16"}) == ([], [])
    assert find({"training.dtype": "bfloat16", PP: 2, "parallelism.pipeline_parallel_microbatch_size": 8}) == ([], [])


@pytest.mark.parametrize(
    ("settings", "world_size", "expected"),
    [
        ({TP: 3}, 8, ["multiply to 3", "does not divide the 8 processes", "multiple of 3 processes"]),
        ({TP: 2, CP: 2, PP: 4}, 8, ["multiply to 16", "does not divide the 8 processes", "Lower a degree"]),
        ({TP: 2, SHARD: 2}, 8, ["multiply to 4", "8 processes", "NGPU=4"]),
        ({TP: 2, CP: 2, "training.global_batch_size": 8}, 8, ["8 x 2 = 16", "Use 16,"]),
        ({PP: 2, "training.global_batch_size": 72}, 8, ["8 x 4 = 32", "Use 64 or 96,"]),
    ],
)
def test_degrees_that_do_not_fit_the_processes_are_refused(settings, world_size, expected):
    settings = {"training.seq_len": 2052 if settings.get(TP) == 3 else 2048, **settings}
    (problem,), _ = find(settings, world_size=world_size)
    for words in expected:
        assert words in problem
    assert find(settings) == ([], [])


@pytest.mark.parametrize(
    ("settings", "world_size"),
    [
        ({TP: 2, CP: 2, PP: 2}, 8),
        ({TP: 2, CP: 2, PP: 2, "training.global_batch_size": 8}, 8),
        ({TP: 8, PP: 16, CP: 4, "parallelism.data_parallel_replicate_degree": 4}, 16384),
        ({TP: 2, SHARD: 4}, 8),
    ],
)
def test_degrees_that_fit_the_processes_are_in_order(settings, world_size):
    if settings.get(PP) == 16:
        settings = {**settings, "training.local_batch_size": 16}
    assert find(settings, world_size=world_size) == ([], [])


def test_everything_is_found_at_once_and_a_wrong_degree_once():
    problems, _ = find(
        {
            TP: 0,
            CP: 3,
            BALANCER: "ptrr",
            METHOD: "ring",
            "model.attn_mask_type": "block_causal",
            "training.seq_len": 100,
        },
        world_size=4,
    )
    starts = [
        f"{TP} = 0: must be",
        "training.seq_len = 100: must be a multiple of",
        f"{BALANCER} = ptrr",
        f"{METHOD} = ring",
    ]
    assert [p.startswith(start) for p, start in zip(problems, starts, strict=True)] == [True] * 4


WIRE = {"training.gradient_wire_dtype": "float8"}


@pytest.mark.parametrize("settings", [{}, {CP: 2, SHARD: 1}, {TP: 2}, {PP: 2}])
def test_gradients_in_float8_go_with_what_shards(settings):
    assert find(WIRE | settings) == ([], [])


def test_gradients_in_float8_need_the_process_group_and_shards():
    (problem,), _ = find(WIRE | {"parallelism.fsdp_collectives": "auto"})
    assert "Use parallelism.fsdp_collectives = nccl" in problem
    (problem,), _ = find(WIRE | {SHARD: 1, "parallelism.data_parallel_replicate_degree": 4})
    assert "leaves replicas, whose gradients are all-reduced" in problem
    _, (warning,) = find(WIRE | {SHARD: 1})
    assert "training.gradient_wire_dtype = float8 has no effect" in warning


def test_shard_degree_that_the_number_of_processes_makes_1_counts_as_such():
    assert find(WIRE | {REPLICATE: 2}, world_size=4) == ([], [])
    (problem,), _ = find(WIRE | {REPLICATE: 2}, world_size=2)
    assert "leaves replicas, whose gradients are all-reduced" in problem
    assert find({REPLICATE: 2, PREFETCH: 2}, world_size=4) == ([], [])
    _, (warning,) = find({REPLICATE: 2, PREFETCH: 2}, world_size=2)
    assert warning.startswith(f"{PREFETCH} = 2 has no effect: {SHARD} and ")
