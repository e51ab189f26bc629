#!/usr/bin/env bash
# Check the code and run the tests: scripts/test.sh [--all] [pytest arguments]
#
# Sets up what is missing (as run_train.sh does), then runs ruff, mypy and pytest over tests/unit, tests/distributed,
# tests/faults and tests/cluster, and over tests/gpu where there is a CUDA device. Paths among the arguments take the place
# of these folders. All of the checks run, even after one has failed; the exit code is 1 if any did.
#
# --all: also the tests that are marked exhaustive, as continuous integration does: more combinations of what the others show,
# and jobs on a SLURM of their own.
#
# Most of tests/cluster is exhaustive. It needs SLURM and ip, and the test of the run report looks at it in Chromium. Where root runs them on Debian or Ubuntu,
# these are installed with apt-get, unless BLOOMERY_INSTALL=0; where they cannot be, tests are skipped with the reason.
set -euo pipefail

if [[ "${1:-}" == -h || "${1:-}" == --help ]]; then
    sed -n '2,/^[^#]/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
    exit 0
fi

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)"
source "$REPO/scripts/setup_env.sh"
setup_environment dev
cd "$REPO"

FAILED=()
check() { # NAME COMMAND...
    local name="$1"
    shift
    echo "== $name"
    "$@" || FAILED+=("$name")
}

PATHS=(tests/unit tests/distributed tests/faults tests/cluster)
for word in "$@"; do
    if [[ -e "${word%%::*}" ]]; then
        PATHS=()
    fi
done

# Several processes at a time share the cores in the distributed tests.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
check "ruff check" "$PYTHON" -m ruff check .
check "ruff format" "$PYTHON" -m ruff format --check .
check "mypy" "$PYTHON" -m mypy
# For two cores: many tests wait, for clusters and for each other's ranks. GPUs are not shared.
WORKERS=(-n "${TEST_WORKERS:-4}" --no-loadscope-reorder)
if ((${#PATHS[@]})); then
    check "pytest" "$PYTHON" -m pytest "${WORKERS[@]}" "${PATHS[@]}" "$@"
    if "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
        check "pytest on GPUs" "$PYTHON" -m pytest tests/gpu "$@"
    fi
else
    check "pytest" "$PYTHON" -m pytest "$@"
fi

if ((${#FAILED[@]})); then
    printf 'FAILED: %s\n' "${FAILED[@]}" >&2
    exit 1
fi
echo "All checks passed."
