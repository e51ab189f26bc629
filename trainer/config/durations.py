"""Durations as SLURM writes them."""

import re

_DURATION = re.compile(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?")


def parse_duration(text: str) -> int | None:
    """Return the seconds of `days-hours:minutes:seconds`, `hours:minutes:seconds` or `minutes:seconds`.

    None: it is no such duration (SLURM says UNLIMITED, NOT_SET, INVALID).
    """
    match = _DURATION.fullmatch(text.strip())
    if match is None:
        return None
    days, first, second, third = match.groups()
    if third is None and days is not None:  # SLURM's days-hours:minutes
        hours, minutes, seconds = int(first), int(second), 0
    elif third is None:
        hours, minutes, seconds = 0, int(first), int(second)
    else:
        hours, minutes, seconds = int(first), int(second), int(third)
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
