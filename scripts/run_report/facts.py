"""The words of a run report: what a run was, how it went, and what in it wants a look. Times are UTC."""

import datetime
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.components.metrics import format_seconds
from trainer.components.run_history import RunHistory
from trainer.config.fields import get_leaves, show

MAX_ROWS = 300
"""Of the table of events."""
# From which values on a remark is made. Of memory: where the allocator begins to give its cache back.
_DATA_WAIT, _STALL, _MEMORY_PERCENT, _SLOWER, _IMBALANCE, _SATURATED, _SLOW_RANK = 0.02, 0.02, 95, 0.05, 2.0, 1e-4, 1.05
# Where runs lie says nothing about how they differ.
_PLACES = ("job.dump_folder",)


@dataclass(frozen=True)
class Remark:
    """Something that wants a look."""

    level: Literal["bad", "worth knowing"]
    text: str


@dataclass(frozen=True)
class Happening:
    """A row of the table of events: one event, or all with the same words."""

    time: str
    steps: str
    kind: str
    text: str


def format_time(seconds: float | None) -> str:
    """Write a Unix time: 2026-11-21 19:52:14."""
    if seconds is None:
        return "not known"
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def describe_end(run: RunHistory, now: float) -> tuple[str, str]:
    """Return the state of a run in a word or two, and a sentence about it."""
    state = run.describe_state(now)
    total = run.settings.get("training.steps")
    done = f"step {run.last_step():,}" + (f" of {total:,}" if total else "")
    if state in ("going on", "silent"):
        last = run.last_word()
        ago = "" if last is None else f", {format_seconds(max(now - last, 0))} before this page was made"
        if state == "silent":
            return "no word", f"{done} was its last word{ago}: killed, on a host that is gone, or hanging."
        return "going on", f"{done} was logged last{ago}."
    if state == "ended":
        return state, f"{done} was its last."
    return state, f"{run.status['reason']} (step {run.status['step']:,})."


def get_facts(run: RunHistory, now: float) -> dict[str, str]:
    """Return the main figures of a run, by what they are. "-": not known."""
    settings, last = run.settings, run.records[-1]
    losses = run.curve("loss")
    validation = [event["loss"] for event in run.get_events("validation") if event.get("loss") is not None]
    hardware = _get_environment(run).get("hardware", {})
    speed = _get_steady(run, "tokens_per_second")
    state, sentence = describe_end(run, now)
    first_event = run.events[0] if run.events else {}
    memory = _get(run, "memory_gib", max)
    waited = _get(run, "data_wait", statistics.fmean)
    final = [step for step in losses if step > 0.9 * run.last_step()]
    return {
        "what": str(settings.get("job.description") or "-"),
        "model": " ".join(str(settings[key]) for key in ("model.name", "model.flavor") if key in settings) or "-",
        "data": str(settings.get("training.dataset_path") or settings.get("training.dataset") or "-"),
        "on": f"{hardware['devices']} x {hardware['device']}" if hardware else "-",
        "state": f"{state}: {sentence}",
        "began": format_time(first_event.get("time")),
        "last word": format_time(run.last_word()),
        "training time": format_seconds(last["elapsed_seconds"]) if "elapsed_seconds" in last else "-",
        "tokens seen": f"{last['tokens_seen']:,}" if "tokens_seen" in last else "-",
        "loss, first step": _format(losses and next(iter(losses.values())), ".4f"),
        "loss, mean of the last tenth": _format(final and statistics.fmean(losses[step] for step in final), ".4f"),
        "validation loss, last": _format(validation and validation[-1], ".4f"),
        "tokens/s a device, median": _format(speed and statistics.median(speed), ",.0f"),
        "MFU, median": _format((mfu := _get_steady(run, "mfu")) and statistics.median(mfu), ".1f", "%"),
        "memory at most": _format(memory, ".2f", " GiB"),
        "waiting for data": _format(None if waited is None else 100 * waited, ".1f", "% of the time"),
        "checkpoints kept": ", ".join(f"step {step:,}" for step in run.kept_checkpoints[-4:]) or "none",
        "folder": str(run.folder),
    }


def _format(value: Any, spec: str, unit: str = "") -> str:
    return "-" if value is None or value == [] or value == {} else f"{value:{spec}}{unit}"


def _get(run: RunHistory, key: str, combine: Callable[[list[float]], float]) -> float | None:
    values = list(run.curve(key).values())
    return combine(values) if values else None


def _get_steady(run: RunHistory, key: str) -> list[float]:
    """Return the values of a key without those of the first logged step after each start, which warms up."""
    starts = [event["step"] for event in run.get_events("start", "resume")] or [0]
    items = list(run.curve(key).items())
    warm_up = {next((step for step, _ in items if step > start), None) for start in starts}
    steady = [value for step, value in items if step not in warm_up]
    return steady or [value for _, value in items]


def find_remarks(run: RunHistory, now: float) -> list[Remark]:
    """Return what someone who was not there should know first: what went wrong, and what costs speed or quality."""
    return [*_find_incidents(run, now), *_find_losses_of_speed(run), *_find_low_quality(run)]


def _find_incidents(run: RunHistory, now: float) -> Iterator[Remark]:
    state, sentence = describe_end(run, now)
    if state in ("failed", "no word"):
        yield Remark("bad", f"The run {'failed' if state == 'failed' else 'gives no sign of life'}: {sentence}")
    elif state == "preempted":
        yield Remark(
            "worth knowing",
            f"Told to stop before its end: {sentence} The same command goes on from its newest checkpoint.",
        )
    failed = run.get_events("checkpoint_failed")
    if failed:
        yield Remark(
            "bad", f"{_count(failed, 'checkpoint')} could not be saved; the last time: {failed[-1].get('error')}"
        )
    rollbacks = run.get_events("rollback")
    resumes = len(run.get_events("resume")) - len(rollbacks)
    if resumes > 0:
        steps = ", ".join(f"{event['step']:,}" for event in run.get_events("resume")[-8:])
        yield Remark("worth knowing", f"Stopped and resumed {_times(resumes)}: it went on from step {steps}.")
    if rollbacks:
        yield Remark(
            "bad",
            f"Rolled back {_times(len(rollbacks))}: bad loss or gradient at step {rollbacks[-1].get('failed_step')}.",
        )
    skips = run.get_events("skip")
    if skips:
        where = ", ".join(f"{event['step']:,}" for event in skips[:8]) + (", ..." if len(skips) > 8 else "")
        yield Remark(
            "bad",
            f"{_count(skips, 'step')} left out, because loss or gradient was not finite or a spike: step {where}.",
        )
    lost = [record["step"] for record in run.records if record.get("nonfinite")]
    if lost and not skips:
        yield Remark("bad", f"Values that are not finite in {_count(lost, 'logged step')}, first at step {lost[0]:,}.")
    for kind, text in (("fallback", "done otherwise than the settings ask for first"), ("warning", "warned of")):
        found = {event.get("message") for event in run.get_events(kind)}
        if found:
            yield Remark("worth knowing", f"{_count(found, 'thing')} {text}: see the events below.")


def _find_losses_of_speed(run: RunHistory) -> Iterator[Remark]:
    wait = _get_steady(run, "data_wait")
    if wait and statistics.fmean(wait) > _DATA_WAIT:
        yield Remark("worth knowing", f"The loop waited for data {statistics.fmean(wait):.1%} of the time.")
    elapsed = run.records[-1].get("elapsed_seconds") or 0
    stalled = sum(event.get("stall_seconds", 0) for event in run.get_events("checkpoint", "checkpoint_failed"))
    if elapsed and stalled / elapsed > _STALL:
        yield Remark("worth knowing", f"Training stood still for checkpoints {stalled / elapsed:.1%} of the time.")
    speeds = _get_steady(run, "tokens_per_second")
    tenth = len(speeds) // 10
    if tenth:
        change = statistics.median(speeds[-tenth:]) / statistics.median(speeds) - 1
        if change < -_SLOWER:
            yield Remark("worth knowing", f"The last tenth was {-change:.0%} slower than the run as a whole.")
    if (_get(run, "memory_retries", max) or 0) > 0:
        yield Remark("bad", "Memory was nearly full: the allocator gave its cache back and tried again, which is slow.")
    elif (_get(run, "memory_percent", max) or 0) > _MEMORY_PERCENT:
        yield Remark("worth knowing", f"Memory was {_get(run, 'memory_percent', max):.0f}% full at most.")
    slow = [record for record in run.records if (record.get("ranks/matmul_slowdown") or 0) > _SLOW_RANK]
    if slow:
        worst = max(slow, key=lambda record: record["ranks/matmul_slowdown"])
        yield Remark(
            "bad",
            f"A GPU computed up to {worst['ranks/matmul_slowdown'] - 1:.0%} slower than the others, which wait for it: rank "
            f"{worst.get('ranks/matmul_rank')} at step {worst['step']:,}, in {_count(slow, 'logged step')}.",
        )


def _find_low_quality(run: RunHistory) -> Iterator[Remark]:
    loads = list(run.curve("experts/max_over_mean").values())
    recent = loads[-max(1, len(loads) // 10) :]
    if recent and statistics.median(recent) > _IMBALANCE:
        yield Remark(
            "worth knowing",
            f"Experts are uneven: at the end the busiest has {statistics.median(recent):.1f} times the mean load.",
        )
    if (_get(run, "experts/dropped", max) or 0) > 0:
        yield Remark("bad", "Counts of tokens by expert do not add up: tokens were lost.")
    if _get(run, "experts/forced_balance", max):
        yield Remark("bad", "Tokens were dealt out to the experts in turn: a benchmark, and no training.")
    cut = _get(run, "float8/saturated_max", max)
    if cut and cut > _SATURATED:
        yield Remark(
            "worth knowing", f"Float8 cut off up to {cut:.2%} of a tensor's elements: see the picture for when."
        )


def _count(things: Any, name: str) -> str:
    return f"{len(things):,} {name}{'' if len(things) == 1 else 's'}"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def describe_changes(run: RunHistory) -> dict[str, tuple[str, str]]:
    """Return the settings of a run that are not the defaults, by key: value and default."""
    leaves = get_leaves()
    return {
        key: (show(value), show(leaves[key].default) if key in leaves else "no setting of this program")
        for key, value in run.settings.items()
        if key not in _PLACES and (key not in leaves or value != leaves[key].default)
    }


def describe_differences(runs: Sequence[RunHistory]) -> dict[str, list[str]]:
    """Return the settings in which runs differ, by key: the value of each run."""
    keys = list(dict.fromkeys(key for run in runs for key in run.settings if key not in _PLACES))
    values = {key: [show(run.settings[key]) if key in run.settings else "-" for run in runs] for key in keys}
    return {key: texts for key, texts in values.items() if len(set(texts)) > 1}


def describe_saves(run: RunHistory) -> list[list[str]]:
    """Return a row for each save: step, GiB, seconds, seconds of standstill, and whether it is still there."""
    rows = []
    for event in run.get_events("checkpoint", "checkpoint_failed"):
        step = event.get("saved_step", event["step"])
        fate = "kept" if step in run.kept_checkpoints else "deleted since"
        rows.append(
            [
                f"{step:,}",
                _format(event.get("gib"), ",.2f"),
                _format(event.get("seconds"), ",.1f"),
                _format(event.get("stall_seconds"), ",.2f"),
                f"FAILED: {event.get('error')}" if event["event"] == "checkpoint_failed" else fate,
            ]
        )
    return rows


def describe_events(run: RunHistory) -> list[Happening]:
    """Return what happened, in order, without what has a table or a picture of its own; the same words stand there once."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for event in run.events:
        text = _describe_event(event)
        if text is not None:
            groups.setdefault((event["event"], text), []).append(event)
    rows = []
    for (kind, text), events in groups.items():
        steps = [event["step"] for event in events]
        span = f"{steps[0]:,}" if len(set(steps)) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        times = "" if len(events) == 1 else f" ({len(events)} times)"
        rows.append(Happening(format_time(events[0].get("time")), span, kind.replace("_", " "), text + times))
    if run.status:
        status = run.status
        rows.append(
            Happening(
                format_time(status.get("time")), f"{status['step']:,}", str(status["status"]), str(status["reason"])
            )
        )
    return rows


def _describe_event(event: dict[str, Any]) -> str | None:
    kind = event["event"]
    if kind in ("checkpoint", "validation", "environment"):
        return None
    if kind in ("warning", "fallback"):
        return str(event.get("message"))
    if kind == "rollback":
        return f"back to step {event['step']:,} for what was found at step {event.get('failed_step')}"
    if kind == "end":
        seconds = event.get("seconds")
        return f"{event.get('steps')} steps of this process" + (f" in {format_seconds(seconds)}" if seconds else "")
    fields = {key: value for key, value in event.items() if key not in ("event", "step", "time")}
    return ", ".join(f"{key.replace('_', ' ')} {_show(value)}" for key, value in fields.items())


def _show(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def describe_environments(run: RunHistory) -> list[tuple[str, dict[str, str]]]:
    """Return what a run ran on, and from which step on where that changed: title, and values by name."""
    found: list[tuple[str, dict[str, str]]] = []
    for event in run.get_events("environment"):
        parts = ("versions", "hardware", "program")
        values = {key: str(value) for part in parts for key, value in (event.get(part) or {}).items()}
        if not found or found[-1][1] != values:
            found.append((run.name if not found else f"{run.name}, from step {event['step']:,}", values))
    return found


def _get_environment(run: RunHistory) -> dict[str, Any]:
    events = run.get_events("environment")
    return events[-1] if events else {}
