"""What scripts/fsdp2_benchmark.py asserts of its results, and shows of them. Imports no torch."""

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AFTER = "torch_optimizer_after_fsdp"
NOT_FIXED = "torch_optimizer_before_fsdp_not_fixed"
FIXED = "torch_optimizer_before_fsdp_fixed"
TRAINER, ACCELERATE = "trainer", "accelerate"
VARIANTS = (AFTER, NOT_FIXED, FIXED, TRAINER, ACCELERATE)

GIB = 2**30
_NOISE = 0.01
"""Of peaks of the same program, as a share: libraries take work space when they are first used."""
_OTHER_PROGRAM = 0.05
"""The trainer and accelerate may group weights otherwise; more memory than so much would not be on par."""
_LOSS_NOISE = 0.02
_LEARNT = 0.1
"""Nats a token."""

Results = Mapping[str, dict[str, Any]]
"""What `scripts.fsdp2.measure.measure` returned, by variant."""


@dataclass(frozen=True)
class Claim:
    """A sentence about the results, and whether it is true."""

    text: str
    holds: bool
    figures: str


def check(results: Results) -> list[Claim]:
    """Return what is claimed of those variants that were measured."""
    claims: list[Claim] = []
    if AFTER in results and NOT_FIXED in results:
        claims += _check_training(results[AFTER], results[NOT_FIXED])
    if NOT_FIXED in results:
        claims += _check_not_fixed(results[NOT_FIXED])
    if AFTER in results and FIXED in results:
        claims += _check_fixed(results[AFTER], results[FIXED])
    for other in (TRAINER, ACCELERATE):
        if AFTER in results and other in results:
            claims += _check_on_par(results[AFTER], results[other])
    return claims


def _check_training(after: dict[str, Any], not_fixed: dict[str, Any]) -> Iterator[Claim]:
    """Compare on the same batches: one without training, as the other shows, may be easier than the first by chance."""
    few = max(1, len(after["losses"]) // 5)
    trained, untrained = (statistics.fmean(result["losses"][-few:]) for result in (after, not_fixed))
    yield Claim(
        f"{AFTER} learns",
        trained < untrained - _LEARNT,
        f"loss {trained:.3f} at the end, where first weights have {untrained:.3f}",
    )


def _check_not_fixed(result: dict[str, Any]) -> Iterator[Claim]:
    same = result["weights_before"] == result["weights_after"]
    yield Claim(f"{NOT_FIXED} does not train", same, f"weights {'the same' if same else 'changed'} to the last bit")
    held, whole = min(result["optimizer_parameter_bytes"]), result["model_bytes"]
    text = f"{NOT_FIXED} holds the unsharded parameters"
    yield Claim(
        text, held >= whole, f"{held / GIB:.3f} GiB held by the optimizer, of {whole / GIB:.3f} GiB of the model"
    )
    allocated = result["allocated_after_setup_bytes"]
    if allocated is not None:
        yield Claim(
            f"{text} on the GPU", allocated > whole, f"{allocated / GIB:.2f} GiB allocated before the first step"
        )


def _check_fixed(after: dict[str, Any], fixed: dict[str, Any]) -> Iterator[Claim]:
    for key, what in (("losses", "losses"), ("weights_after", "weights")):
        same = after[key] == fixed[key]
        yield Claim(f"{FIXED} equals {AFTER} bit for bit: {what}", same, f"{len(after['losses'])} steps")
    yield Claim(
        f"{FIXED} holds as many bytes of parameters",
        after["optimizer_parameter_bytes"] == fixed["optimizer_parameter_bytes"],
        f"{fixed['optimizer_parameter_bytes'][0] / GIB:.3f} GiB on rank 0",
    )
    for kind in ("allocated", "reserved"):
        peaks = [get_peak(result, kind) for result in (after, fixed)]
        if None not in peaks:
            difference = abs(peaks[1] - peaks[0]) / peaks[0]  # type: ignore[operator]
            text = f"{FIXED}: peak of {kind} memory equals that of {AFTER} within {_NOISE:.0%}"
            yield Claim(text, difference <= _NOISE, f"{peaks[0] / GIB:.2f} and {peaks[1] / GIB:.2f} GiB")  # type: ignore[operator]


def _check_on_par(after: dict[str, Any], other: dict[str, Any]) -> Iterator[Claim]:
    name = other["variant"]
    gaps = [abs(b - a) / a for a, b in zip(after["losses"], other["losses"], strict=True)]
    yield Claim(
        f"{name}: losses are those of {AFTER} within {_LOSS_NOISE:.0%}",
        max(gaps) <= _LOSS_NOISE,
        f"at most {max(gaps):.2e}",
    )
    peaks = [get_peak(result, "allocated") for result in (after, other)]
    if None not in peaks:
        text = f"{name}: peak of allocated memory is at most {_OTHER_PROGRAM:.0%} above that of {AFTER}"
        holds = peaks[1] <= (1 + _OTHER_PROGRAM) * peaks[0]  # type: ignore[operator]
        yield Claim(text, holds, f"{peaks[0] / GIB:.2f} and {peaks[1] / GIB:.2f} GiB")  # type: ignore[operator]


def get_peak(result: dict[str, Any], kind: str, phase: str = "training") -> int | None:
    """Return the largest peak of any rank in bytes; None on a CPU. kind: allocated or reserved. phase: setup or training."""
    peaks = [peak[kind] for peak in result["peak_bytes_by_rank"][phase]]
    return None if None in peaks else max(peaks)


def format_table(results: Results) -> str:
    """Return a Markdown table of all variants."""
    lines = [
        "| | loss, first to last step | held by the optimizer | allocated, set-up | allocated, training | reserved | host |",
        "|-|-|-|-|-|-|-|",
    ]
    for name, result in results.items():
        peaks = [get_peak(result, *of) for of in (("allocated", "setup"), ("allocated",), ("reserved",))]
        cells = [
            f"{result['losses'][0]:.4f} -> {result['losses'][-1]:.4f}",
            _format(result["optimizer_parameter_bytes"][0]),
            *map(_format, peaks),
            _format(max(result["memory"]["host"])),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _format(size: int | None) -> str:
    return "-" if size is None else f"{size / GIB:.2f} GiB" if size > GIB / 10 else f"{1024 * size / GIB:.1f} MiB"


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw memory over time and the losses, in PNG files. Return these. Memory is in GiB of 2^30 bytes."""
    from matplotlib.figure import Figure

    some = next(iter(results.values()))
    settings = some["settings"]
    conditions = (
        f"{settings['model']} {settings['flavor']}, {some['world_size']} x {some['environment']['hardware']['device']}, "
        f"{settings['batch_size']} x {settings['seq_len']} tokens on each"
    )
    written = []
    for kind in ("allocated", "reserved", "host"):
        if None in some["memory"][kind]:
            continue
        figure = Figure(figsize=(11, 5.5), layout="constrained")
        axes = figure.subplots()
        for number, (name, result) in enumerate(results.items()):
            seconds, memory = result["memory"]["seconds"], [size / GIB for size in result["memory"][kind]]
            axes.plot(seconds, memory, label=name, linewidth=1.2, color=f"C{number}")
            axes.axvline(result["built_at_seconds"], color=f"C{number}", linestyle=":", linewidth=0.8)
        axes.set(title=f"{kind.capitalize()} memory of rank 0: {conditions}", ylabel="GiB", ylim=(0, None))
        axes.set_xlabel("seconds since the process began to build the model (dotted: it is built, training begins)")
        axes.legend()
        written.append(folder / f"{kind}_memory.png")
        figure.savefig(written[-1], dpi=110)
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots()
    # Curves that are the same lie on each other: the later, the thinner.
    for number, (name, result) in enumerate(results.items()):
        axes.plot(
            range(1, len(result["losses"]) + 1),
            result["losses"],
            label=name,
            linewidth=9 - 2 * number,
            color=f"C{number}",
        )
    axes.set(title=f"Loss: {conditions}", xlabel="step", ylabel="nats a token")
    axes.legend()
    written.append(folder / "losses.png")
    figure.savefig(written[-1], dpi=110)
    return written
