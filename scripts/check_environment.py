"""Say which of the packages that pyproject.toml asks for are missing from the Python that runs this file.

Reads installed metadata only, so it answers in a tenth of a second and imports nothing heavy. Standard library alone,
and nothing that a Python too old for the project cannot parse (3.6 on), because telling so is one of its jobs.

    python scripts/check_environment.py [--extra NAME]... [--list]

Exit code 0: all there. 1: something is missing; each line on stdout names one requirement and what was found.
2: --extra names none of the project's. 3: this Python is too old. With --list the requirements themselves are printed, one on each line, for `pip install -r`.
"""

import os
import re
import sys

OLDEST_PYTHON = (3, 11)
OPERATORS = {
    ">=": lambda have, want: have >= want,
    "<=": lambda have, want: have <= want,
    "==": lambda have, want: have == want,
    "!=": lambda have, want: have != want,
    ">": lambda have, want: have > want,
    "<": lambda have, want: have < want,
}


def parse_version(text):
    """Return the release part of a version as a tuple: "2.13.0+cpu" -> (2, 13). Pre-releases count as the release."""
    match = re.match(r"\s*v?(\d+(?:\.\d+)*)", text)
    if match is None:
        raise ValueError(f"not a version: {text!r}")
    release = [int(part) for part in match.group(1).split(".")]
    while len(release) > 1 and release[-1] == 0:
        release.pop()
    return tuple(release)


def parse_requirement(text):
    """Split "torch>=2.11,<2.14" into ("torch", [(">=", (2, 11)), ("<", (2, 14))])."""
    match = re.match(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*(.*)$", text)
    if match is None:
        raise ValueError(f"not a requirement: {text!r}")
    bounds = []
    for part in filter(None, (piece.strip() for piece in match.group(2).split(","))):
        bound = re.match(r"(>=|<=|==|!=|>|<)\s*(.+)$", part)
        if bound is None:
            raise ValueError(f"requirement {text!r}: only >=, <=, ==, !=, > and < are understood")
        bounds.append((bound.group(1), parse_version(bound.group(2))))
    return match.group(1), bounds


def load_requirements(pyproject, extras):
    """Return the requirement strings of the project and of the named extras, in the order of the file."""
    import tomllib

    with open(pyproject, "rb") as file:
        project = tomllib.load(file)["project"]
    requirements = list(project.get("dependencies", []))
    optional = project.get("optional-dependencies", {})
    for extra in extras:
        if extra not in optional:
            raise ValueError(f"no extra {extra!r} in {pyproject}; it has: {sorted(optional)}")
        requirements += optional[extra]
    return requirements


def find_problems(requirements):
    """Return one line for each requirement that the installed packages do not meet."""
    from importlib import metadata

    problems = []
    for requirement in requirements:
        name, bounds = parse_requirement(requirement)
        try:
            # None: a folder that an interrupted install or removal left without its metadata.
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            version = None
        if version is None:
            problems.append(f"{requirement} (not installed)")
        elif not all(OPERATORS[operator](parse_version(version), want) for operator, want in bounds):
            problems.append(f"{requirement} (found {version})")
    return problems


def main(argv):
    """Check or list; see the top of the file. Returns the exit code."""
    if sys.version_info < OLDEST_PYTHON:
        needed = ".".join(map(str, OLDEST_PYTHON))
        print(f"Python {needed} or newer is needed; {sys.executable} is {sys.version.split()[0]}")
        return 3
    if "-h" in argv or "--help" in argv:
        print(__doc__.strip())
        return 0
    extras = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--extra"]
    pyproject = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "pyproject.toml")
    try:
        requirements = load_requirements(pyproject, extras)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    lines = requirements if "--list" in argv else find_problems(requirements)
    for line in lines:
        print(line)
    return int(bool(lines) and "--list" not in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
