# Sourced by run_train.sh and scripts/test.sh, which set REPO: finds a Python that has the packages, or makes one.
#
#   setup_environment [EXTRA]   sets PYTHON to an interpreter with the packages of pyproject.toml (and of EXTRA)
#
# An active environment that has the packages is used as it is. Otherwise .venv in the repository is made, filled and used
# again the next time. BLOOMERY_INSTALL=0 never installs anything, =1 always may; unset, installing is off inside a SLURM
# job and where NNODES > 1, for a cluster node must not install by surprise.

die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

check_environment() { # PYTHON [EXTRA]
    "$1" "$REPO/scripts/check_environment.py" ${2:+--extra "$2"} 2>&1
}

find_base_python() { # prints a Python that is new enough, for the new environment
    local candidate
    for candidate in python3 python python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$candidate"
            return 0
        fi
    done
    return 1
}

may_install() {
    case "${BLOOMERY_INSTALL:-}" in
    0) return 1 ;;
    1) return 0 ;;
    "") [[ -z "${SLURM_JOB_ID:-}" && "${NNODES:-1}" == 1 ]] ;;
    *) die "BLOOMERY_INSTALL=$BLOOMERY_INSTALL: must be 0 or 1" ;;
    esac
}

install_environment() { # [EXTRA]: fills .venv; a mark tells a finished install from an interrupted one
    local base requirements quiet
    base="$(find_base_python)" ||
        die "Python 3.11 or newer is needed; found $(python3 --version 2>&1 || echo none). Install one, or activate an environment that has it."
    echo "Setting up $VENV with $base: installing what pyproject.toml asks for (once; BLOOMERY_INSTALL=0 forbids it)." >&2
    mkdir -p "$VENV"
    if command -v flock >/dev/null 2>&1; then
        exec 9>"$VENV/.bloomery-lock"
        flock 9
    fi
    touch "$VENV/.bloomery-incomplete"
    "$base" -m venv "$VENV" ||
        die "$base cannot make a virtual environment (on Debian and Ubuntu: install python3-venv), or activate an environment of your own."
    requirements="$("$VENV/bin/python" "$REPO/scripts/check_environment.py" --list ${1:+--extra "$1"})"
    # pip's progress is for a terminal only; stdout belongs to the program that is started afterwards.
    [[ -t 2 ]] && quiet=() || quiet=(--quiet)
    "$VENV/bin/python" -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check \
        -r <(printf '%s\n' "$requirements") >&2 ||
        die "installing into $VENV failed (see above). Nothing else was changed; run again to carry on."
    rm -f "$VENV/.bloomery-incomplete"
    exec 9>&- || true
}

setup_environment() { # [EXTRA]
    local extra="${1:-}" candidate missing="" reason=""
    VENV="$REPO/.venv"
    for candidate in python python3; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if missing="$(check_environment "$candidate" "$extra")"; then
            PYTHON="$(command -v "$candidate")"
            return 0
        fi
        reason="$reason$(printf '\n  %s:\n' "$(command -v "$candidate")"; printf '%s\n' "$missing" | sed 's/^/    /')"
    done
    PYTHON="$VENV/bin/python"
    if [[ -x "$PYTHON" && ! -e "$VENV/.bloomery-incomplete" ]]; then
        if missing="$(check_environment "$PYTHON" "$extra")"; then
            return 0
        fi
        reason="$reason$(printf '\n  %s:\n' "$PYTHON"; printf '%s\n' "$missing" | sed 's/^/    /')"
    fi
    may_install || die "packages are missing, and installing is off (BLOOMERY_INSTALL=0, a SLURM job, or NNODES > 1).
Activate an environment that has them, or run with BLOOMERY_INSTALL=1. What is missing:$reason"
    install_environment "$extra"
    missing="$(check_environment "$PYTHON" "$extra")" || die "after installing, $VENV still lacks: $missing"
}
