"""The faults that a run must survive, as data: what is injected, what is wanted, and the tests that prove it."""

from dataclasses import dataclass

DEATHS, STOP, LOSS = "tests/faults/test_deaths.py", "tests/faults/test_stop.py", "tests/faults/test_loss.py"
RESUME, TORCHRUN = "tests/faults/test_resume.py", "tests/faults/test_torchrun.py"
CHECKPOINT, TRAINER = "tests/distributed/test_checkpoint.py", "tests/distributed/test_trainer.py"
COMPONENTS, DATA = "tests/unit/components", "tests/unit/components/data"
SLURM = "tests/cluster/test_slurm.py"
SUMS = f"{COMPONENTS}/test_checkpoint_checksums.py"


@dataclass(frozen=True)
class Row:
    """One fault. tests: ids, without parameters."""

    number: int
    fault: str
    wanted: str
    tests: tuple[str, ...]


ROWS = (
    Row(
        1,
        "kill -9 of one rank in a save",
        "the others end in under 30 s and name it; the run goes on exactly from the checkpoint before",
        (
            f"{DEATHS}::test_kill_in_a_save_costs_that_save_alone",
            f"{CHECKPOINT}::test_kill_in_the_middle_of_a_save_leaves_the_one_before",
        ),
    ),
    Row(
        2,
        "kill -9 in a save in the background",
        "the same; what was staged is removed",
        (f"{DEATHS}::test_kill_in_a_save_costs_that_save_alone",),
    ),
    Row(
        3,
        "kill -9 while an existing step is saved anew",
        "one whole checkpoint of that step stays",
        (
            f"{DEATHS}::test_kill_while_an_existing_step_is_saved_anew_keeps_the_old_one",
            f"{COMPONENTS}/test_checkpoint.py::test_interrupted_replacement_leaves_one_whole",
        ),
    ),
    Row(
        4,
        "a restart saves a step again of which a part lies there",
        "no hang; it is replaced",
        (f"{DEATHS}::test_kill_in_a_save_costs_that_save_alone",),
    ),
    Row(
        5,
        "the disk is full",
        "all ranks agree, no junk stays, training goes on with an alarm and stops after too many",
        (
            f"{COMPONENTS}/test_checkpoint_failures.py::test_failing_save_raises_an_alarm_leaves_nothing_and_training_goes_on",
            f"{COMPONENTS}/test_checkpoint_failures.py::test_too_many_failing_saves_in_a_row_stop_the_run",
        ),
    ),
    Row(
        6,
        "one rank cannot write",
        "the same verdict on all",
        (f"{CHECKPOINT}::test_failing_saves_are_counted_alike_on_all_ranks",),
    ),
    Row(
        7,
        "a truncated shard",
        "found before it is loaded; an older checkpoint takes its place",
        (f"{SUMS}::test_damage_is_named_and_an_older_checkpoint_takes_its_place",),
    ),
    Row(
        8,
        "a flipped bit in shard, index or manifest",
        "the sum names the file; an older checkpoint takes its place",
        (f"{SUMS}::test_damage_is_named_and_an_older_checkpoint_takes_its_place",),
    ),
    Row(
        9,
        "all checkpoints are bad",
        "never a silent start from scratch",
        (f"{SUMS}::test_folder_in_which_all_are_damaged_is_never_begun_anew",),
    ),
    Row(
        10,
        "`keep_latest_k` beside partial checkpoints and foreign names",
        "the last good ones and the foreign names stay",
        (
            f"{COMPONENTS}/test_checkpoint.py::test_keep_latest_k_counts_whole_checkpoints_and_leaves_foreign_names_alone",
        ),
    ),
    Row(
        11,
        "SIGTERM or SIGUSR1 to one rank or all",
        "all stop after the same step, save once, `preempted`, exit code 0; the run goes on exactly",
        (f"{STOP}::test_signal_stops_all_ranks_at_one_step_with_one_save",),
    ),
    Row(
        12,
        "signals twice; in a save, a validation, compilation, before the first step",
        "one save, a bounded end",
        (
            f"{STOP}::test_signal_stops_all_ranks_at_one_step_with_one_save",
            f"{STOP}::test_signal_to_one_rank_before_training_ends_all",
            "tests/unit/distributed/test_compile.py::test_processes_that_compile_are_deaf_to_stop_signals",
        ),
    ),
    Row(
        13,
        "SLURM's signals, through torchrun and srun",
        "save, requeue, resume, exact; a lost node too",
        (
            f"{SLURM}::test_run_goes_on_after_its_time_limit",
            f"{SLURM}::test_run_goes_on_after_preemption",
            f"{SLURM}::test_run_goes_on_after_the_loss_of_its_first_node",
        ),
    ),
    Row(
        14,
        "the time limit is near",
        "the run saves and stops by itself before it",
        (f"{STOP}::test_time_limit_stops_and_saves_before_it_is_over",),
    ),
    Row(
        15,
        "a rank raises, or crashes",
        "the first error with its host on top, all end in under 30 s; `--max-restarts` goes on",
        (
            f"{DEATHS}::test_first_cause_stands_on_top_and_all_end",
            f"{TORCHRUN}::test_failed_run_is_restarted_in_place_resumes_and_stops_on_sigterm",
        ),
    ),
    Row(
        16,
        "SIGSTOP of one rank",
        "it is named with its host and place; the run ends within the timeout",
        (f"{DEATHS}::test_rank_that_stands_still_is_named_within_the_timeout",),
    ),
    Row(
        17,
        "the data source stalls",
        "it is called that",
        (
            f"{DEATHS}::test_rank_that_stands_still_is_named_within_the_timeout",
            f"{DATA}/test_streaming.py::test_source_that_gives_nothing_is_named_before_other_ranks_give_up",
        ),
    ),
    Row(
        18,
        "NaN loss, infinite gradient or a spike on one rank",
        "no rank updates; the batch is written down; stop, skip or roll back; the window is not poisoned and is resumed",
        (
            f"{TRAINER}::test_stop_policy_stops_all_ranks_before_an_update",
            f"{TRAINER}::test_skip_policy_leaves_the_step_out_and_goes_on",
            f"{LOSS}::test_rollback_leaves_the_batch_out_and_equals_skipping_it",
            f"{LOSS}::test_spike_is_skipped_on_the_device_and_its_window_is_resumed",
            f"{COMPONENTS}/test_loss_window.py::test_window_is_not_poisoned_by_one_value",
        ),
    ),
    Row(
        19,
        "the same bad batch after a restart",
        "recognised: passed over, or refused at the third start",
        (f"{LOSS}::test_batch_that_fails_again_is_recognised",),
    ),
    Row(20, "resumed twice, in mid-epoch", "exact", (f"{TRAINER}::test_resume_is_bitwise_twice_in_a_row",)),
    Row(
        21,
        "resumed on other meshes",
        "the same order of tokens, the loss within tolerance",
        (
            f"{TRAINER}::test_resume_with_other_ranks_keeps_data_and_loss",
            f"{RESUME}::test_resume_on_other_meshes_keeps_token_order_and_loss",
        ),
    ),
    Row(
        22,
        "a vocabulary that ranks do not divide (259 on 2)",
        "exact",
        (f"{TRAINER}::test_resume_is_bitwise_twice_in_a_row",),
    ),
    Row(
        23,
        "a mistake in the settings",
        "told with file and line, and with what was meant, before torch is imported",
        (
            "tests/unit/config/test_toml_file.py::test_read_toml_names_file_line_and_remedy",
            "tests/unit/test_train.py::test_all_problems_are_told_at_once_by_the_first_rank_alone",
            "tests/unit/test_train.py::test_program_answers_without_torch_and_without_a_traceback",
        ),
    ),
    Row(
        24,
        "settings that differ from the checkpoint's",
        "shown; what changes the result is refused unless it is meant",
        ("tests/unit/config/test_changes.py::test_change_of_the_result_is_refused_unless_it_is_said_to_be_meant",),
    ),
    Row(
        25,
        "a tokenizer larger than the vocabulary, a token beyond it",
        "refused at the start, with both numbers",
        (
            "tests/unit/test_preflight.py::test_vocabulary_smaller_than_the_tokenizers_is_refused",
            f"{DATA}/test_token_files.py::test_id_outside_vocabulary_raises",
        ),
    ),
    Row(
        26,
        "a row without its field, bad JSON, an empty source",
        "named by file and row, left out, counted, and fatal past a limit, in one message",
        (
            f"{DATA}/test_sources.py::test_bad_line_is_named_and_left_out",
            f"{DATA}/test_streaming.py::test_too_many_bad_rows_stop_after_the_good_batches",
            f"{DATA}/test_mixture.py::test_empty_source_is_refused",
            "tests/unit/test_train.py::test_rows_and_folders_of_a_run_that_cannot_be_used_are_told",
        ),
    ),
    Row(
        27,
        "data that changed under the same name",
        "refused by fingerprint",
        (
            f"{RESUME}::test_data_that_changed_under_the_same_name_are_refused",
            f"{DATA}/test_token_files.py::test_read_refuses_replaced_shard",
        ),
    ),
    Row(
        28,
        "a finished run whose `steps` are raised",
        "goes on from its full state",
        (f"{TRAINER}::test_run_with_more_steps_goes_on",),
    ),
    Row(
        29,
        "export to Hugging Face",
        "equal logits, a complete index",
        (
            "tests/unit/scripts/test_convert_checkpoint.py::test_round_trip_is_bitwise_and_transformers_computes_the_same",
            "tests/distributed/test_hf_checkpoint.py::test_run_saves_what_transformers_loads_and_another_begins_from_it",
        ),
    ),
    Row(30, "no network", "the whole run works", (f"{RESUME}::test_whole_run_needs_no_network",)),
    Row(
        31,
        "a rank on NCCL is killed, or stands still",
        "the others end in under 60 s; the flight recorder is written when a timeout is over",
        (
            "tests/gpu/test_faults.py::test_others_end_when_a_rank_on_nccl_is_killed",
            "tests/gpu/test_faults.py::test_rank_on_nccl_that_waits_for_its_data_is_named_and_the_recorder_is_written",
        ),
    ),
)
