#!/usr/bin/env bash
# Train: ./run_train.sh [--section.key value ...]
#
#   CONFIG_FILE  TOML file of the run (default: train_configs/debug_llama3.toml)
#   NGPU         processes on this host (default: the visible GPUs, else 1)
#                (job.plan plans for NGPU x NNODES, whatever is here: NGPU=8 NNODES=4 ./run_train.sh --job.plan)
#   LOG_RANK     ranks whose log is shown, such as 0 or 0,8 (default 0). Warnings and errors of every rank are always shown.
#   NNODES       hosts (default 1). With more than one, on each of them either MASTER_ADDR, MASTER_PORT and NODE_RANK, or
#                RDZV_ENDPOINT (host:port of one of them). RDZV_ID, the same on all, keeps runs at one port apart.
#   MAX_RESTARTS how often to start again in place after a failure (default 0); so does the argument --max-restarts N. With
#                checkpoint.enable the run goes on from its newest checkpoint.
#   BLOOMERY_INSTALL  0: never install packages (the default inside a SLURM job and on several hosts), 1: always may.
#
# Every argument overrides a setting: ./run_train.sh --training.steps 200 --compile.enable. All of them: ./run_train.sh --help
set -euo pipefail

REPO="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)"
source "$REPO/scripts/setup_env.sh"

count_gpus() {
    local count=0
    if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]]; then
        # "" and -1 hide every GPU; otherwise one entry is one GPU (or one MIG slice).
        [[ -z "$CUDA_VISIBLE_DEVICES" || "$CUDA_VISIBLE_DEVICES" == -1 ]] ||
            count="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)"
    elif command -v nvidia-smi >/dev/null 2>&1; then
        # A broken driver can hang or fail here: that counts as no GPU.
        count="$(timeout 20 nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)"
    fi
    echo "$count"
}

find_config() { # prints CONFIG_FILE as a path from here, else from the repository
    local file="${CONFIG_FILE:-train_configs/debug_llama3.toml}"
    if [[ ! -e "$file" && "$file" != /* && -e "$REPO/$file" ]]; then
        file="$REPO/$file"
    fi
    echo "$file"
}

require_count() { # NAME VALUE
    [[ "$2" =~ ^[1-9][0-9]*$ ]] || die "$1=$2: must be a whole number, at least 1"
}

set_launch() { # fills LAUNCH, the arguments of torchrun
    if ((NNODES == 1)); then
        # Port 0: any free one. The loopback address spares machines whose host name does not resolve.
        LAUNCH=(--nnodes 1 --rdzv_backend c10d --rdzv_endpoint localhost:0 --local_addr localhost)
    elif [[ -n "${RDZV_ENDPOINT:-}" ]]; then
        LAUNCH=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id "${RDZV_ID:-bloomery}")
    elif ((MAX_RESTARTS > 0)); then
        die "MAX_RESTARTS=$MAX_RESTARTS on several hosts needs RDZV_ENDPOINT (and RDZV_ID), by which they find each other again"
    elif [[ -n "${MASTER_ADDR:-}" && -n "${NODE_RANK:-}" ]]; then
        LAUNCH=(--nnodes "$NNODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
        # Hosts of two runs that meet at one port by mistake do not take each other for their own.
        LAUNCH+=(--rdzv_id "${RDZV_ID:-bloomery}")
    else
        die "NNODES=$NNODES needs MASTER_ADDR and NODE_RANK (and MASTER_PORT), or RDZV_ENDPOINT (and RDZV_ID), on each host"
    fi
    LAUNCH+=(--nproc_per_node "$NGPU" --max_restarts "$MAX_RESTARTS")
}

wants_answer() { # whether the arguments ask for an answer and not for a run
    local word
    for word in "$@"; do
        case "$word" in
        -h | --help | --job.validate[_-]only | --job.validate[_-]only=[Tt]rue | --job.plan | --job.plan=[Tt]rue | \
            --job.plan[_-]search | --job.plan[_-]search=[Tt]rue)
            return 0
            ;;
        esac
    done
    return 1
}

take_max_restarts() { # takes --max-restarts N out of the arguments, which are for the program; the rest goes to WORDS
    WORDS=()
    while (($#)); do
        case "$1" in
        --max-restarts | --max_restarts)
            (($# > 1)) || die "--max-restarts: how many? Such as --max-restarts 3"
            MAX_RESTARTS="$2"
            shift
            ;;
        --max-restarts=* | --max_restarts=*) MAX_RESTARTS="${1#*=}" ;;
        *) WORDS+=("$1") ;;
        esac
        shift
    done
}

MAX_RESTARTS="${MAX_RESTARTS:-0}"
take_max_restarts "$@"
set -- ${WORDS[@]+"${WORDS[@]}"}
[[ "$MAX_RESTARTS" =~ ^[0-9]+$ ]] || die "MAX_RESTARTS=$MAX_RESTARTS: must be a whole number"

GPUS="$(count_gpus)"
NGPU="${NGPU:-$((GPUS > 0 ? GPUS : 1))}"
NNODES="${NNODES:-1}"
LOG_RANK="${LOG_RANK:-0}"
require_count NGPU "$NGPU"
require_count NNODES "$NNODES"
[[ "$LOG_RANK" =~ ^[0-9]+(,[0-9]+)*$ ]] || die "LOG_RANK=$LOG_RANK: must be ranks separated by commas, such as 0 or 0,8"
wants_answer "$@" || set_launch
setup_environment

ARGS=("$@")
if [[ " $*" != *" --job.config_file"* && " $*" != *" --job.config-file"* ]]; then
    ARGS=("$@" --job.config_file "$(find_config)") # last: a stray word before it is then named for what it is
fi
# The program is found from any folder, and a `models` or `trainer` folder of the user's does not get in its way.
export PYTHONPATH="$REPO:$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONSAFEPATH=1 LOG_RANK

if wants_answer "$@"; then
    WORLD_SIZE=$((NNODES * NGPU)) exec "$PYTHON" -m trainer.train "${ARGS[@]}"
fi
# Mistakes in the settings are answered here, in under a second and once, before any process is launched.
WORLD_SIZE=$((NNODES * NGPU)) "$PYTHON" -m trainer.train "${ARGS[@]}" --job.validate_only >/dev/null || exit $?

CORES="$("$PYTHON" -c 'import os; print(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())')"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((CORES > NGPU ? CORES / NGPU : 1))}"
if ((GPUS == 0)); then
    # Waiting threads sleep. By default they spin, which costs a run several times its speed when anything else uses the cores.
    export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
fi
if ((GPUS > 0)) && [[ -z "${PYTORCH_ALLOC_CONF:-}${PYTORCH_CUDA_ALLOC_CONF:-}" ]]; then
    export PYTORCH_ALLOC_CONF=expandable_segments:True # less memory lost between blocks of different sizes
fi

echo "Launching $NGPU process(es) on $NNODES host(s), $GPUS GPU(s) here: ${ARGS[*]}"
if ((MAX_RESTARTS > 0)); then
    # The store that torchrun shares over restarts (seen in 2.13) keeps what the dead processes said, which leads new ones astray.
    export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
fi
# job.time_limit counts from here, over restarts in place.
export BLOOMERY_START_TIME="${EPOCHSECONDS:-$(date +%s)}"
# A stop signal is for the program, which saves. SIGUSR1 would kill the launcher and leave the processes behind.
trap '' USR1
exec "$PYTHON" -m torch.distributed.run "${LAUNCH[@]}" -m trainer.train "${ARGS[@]}"
