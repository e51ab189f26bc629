"""Which layouts a search tries, and what it lists: with plans that are made up."""

import dataclasses
import math

from tests.unit.planner.plans import make_made_up_plan
from trainer.config.manager import load_config
from trainer.config.toml_file import tomli
from trainer.planner.search import (
    Degrees,
    Result,
    Search,
    apply_layout,
    format_result,
    format_results,
    format_toml,
    get_degrees,
)

ARGUMENTS = ["--model.flavor", "8B", "--training.local_batch_size", "2", "--compile.enable"]


def search(fits, *, world_size=8, arguments=()):
    """Search with plans in which `fits` decides, and speed falls with recomputation and tensor parallelism."""
    tried = []

    def plan(config, world_size):
        tried.append(config)
        speed = 1000 * config.training.local_batch_size / config.parallelism.tensor_parallel_degree
        speed /= {"none": 1, "selective": 2, "full": 3}[config.activation_checkpoint.mode]
        return make_made_up_plan(speed=speed, needed=1 if fits(config) else 200, world_size=world_size)

    config = load_config([*ARGUMENTS, *arguments]).config
    return Search(config, world_size, plan).run(), tried, config


def test_the_fastest_layout_that_fits_comes_first_and_can_be_pasted():
    results, _, config = search(lambda c: c.training.local_batch_size <= 2)
    assert all(result.fits for result in results)
    speeds = [result.plan.tokens_per_second for result in results]
    assert speeds == sorted(speeds, reverse=True)
    best = results[0].layout
    assert (best["activation_checkpoint.mode"], best["training.local_batch_size"]) == ("none", 2)
    pasted = tomli.loads("\n".join(format_toml(best)))
    assert pasted["training"] == {"local_batch_size": 2}
    changed = apply_layout(config, best)
    assert dataclasses.replace(config.parallelism, **pasted["parallelism"]) == changed.parallelism


def test_more_recomputation_is_tried_only_where_it_can_make_room():
    _, tried, _ = search(lambda _: True, world_size=1)
    assert [(c.activation_checkpoint.mode, c.training.local_batch_size) for c in tried] == [("none", 4)]


def test_layouts_that_the_model_refuses_are_not_tried():
    _, tried, _ = search(lambda _: False, world_size=64, arguments=["--plan.search_seconds", "20"])
    degrees = {c.parallelism.tensor_parallel_degree for c in tried}
    assert degrees <= {1, 2, 4, 8}
    assert all(c.parallelism.expert_parallel_degree == 1 for c in tried), "Llama has no experts"


def test_where_the_smallest_does_not_fit_no_larger_one_is_tried_and_failures_are_left_out():
    def plan(config, world_size):
        shown.append((config.activation_checkpoint.mode, config.training.local_batch_size))
        if config.parallelism.tensor_parallel_degree > 1:
            raise RuntimeError("the planner failed:\nout of ideas")
        return make_made_up_plan(needed=200, world_size=world_size)

    shown: list[tuple[str, int]] = []
    results: list[Result] = []
    config = load_config([*ARGUMENTS, "--plan.search_seconds", "5"]).config
    Search(config, 2, plan, show=results.append).run()
    assert shown[:2] == [("none", 4), ("full", 1)]
    assert ("none", 1) not in shown[2:4]
    assert results
    assert all(result.layout["parallelism.tensor_parallel_degree"] == 1 for result in results)
    assert format_result(results[0]).startswith("too large: tokens/s per GPU")


def test_search_begins_with_the_settings_and_goes_on_from_the_best_so_far():
    best = Degrees(tp=8, cp=2, pp=8)

    def plan(config, world_size):
        degrees = get_degrees(config)
        tried[degrees] = config
        if degrees == best:
            search._ends_at = 0.0
        distance = sum(abs(math.log2(degree / wanted)) for degree, wanted in zip(degrees, best, strict=True))
        return make_made_up_plan(speed=1000 - distance, needed=10 if degrees.pp > 2 else 200 + distance)

    tried: dict[Degrees, object] = {}
    search = Search(load_config([*ARGUMENTS, "--parallelism.tensor_parallel_degree", "2"]).config, 16384, plan)
    fastest = search.run()[0].layout
    assert next(iter(tried)) == Degrees(tp=2)
    assert best in tried
    assert len(tried) < 40
    assert fastest["parallelism.pipeline_parallel_degree"] == 8
    assert (fastest["training.local_batch_size"], fastest["parallelism.pipeline_parallel_microbatch_size"]) == (128, 2)


def test_batches_divide_that_of_the_step_and_weights_are_gathered_again_where_a_pipeline_would_not_fit():
    _, tried, _ = search(
        lambda c: c.parallelism.fsdp_reshard_after_forward == "always" and c.parallelism.tensor_parallel_degree == 1,
        arguments=["--training.global_batch_size", "24", "--plan.search_seconds", "20"],
    )
    assert any(c.parallelism.fsdp_reshard_after_forward == "always" for c in tried)
    pipelines = [c for c in tried if c.parallelism.pipeline_parallel_degree == 2 and get_degrees(c).cp == 1]
    # Four data-parallel ranks with six sequences each; half as many with tensor parallelism.
    assert {(c.training.local_batch_size, c.parallelism.tensor_parallel_degree) for c in pipelines} >= {(6, 1), (12, 2)}


def test_where_nothing_fits_it_says_so():
    results, _, _ = search(lambda _: False, world_size=1)
    assert len(results) == 1
    assert "nothing fits" in format_results(results)


def test_search_ends_with_what_it_has_when_a_layout_takes_too_long():
    def plan(config, world_size):
        tried.append(config)
        if len(tried) == 2:
            search._ends_at = 0.0
            raise TimeoutError
        return make_made_up_plan(needed=1)

    tried: list[object] = []
    search = Search(load_config(ARGUMENTS).config, 8, plan)
    assert len(search.run()) == 1
    assert len(tried) == 2
