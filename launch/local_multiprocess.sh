#!/usr/bin/env bash
# Several processes of one run on this machine, over loopback: to try out what a cluster will do.
#
#   launch/local_multiprocess.sh 2 --config=configs/quickstart.py --workdir=runs/two
#
# The first argument is the number of processes, the others are those of `clip-jax train`. Ctrl-C and
# SIGTERM reach all: they save the same step and end with 130. The first to fail ends the others.
# CLIP_JAX is the command (default: clip-jax), PORT that of the coordinator (default: a random one).
set -euo pipefail

if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    echo "usage: $0 NUM_PROCESSES --config=RECIPE --workdir=WORKDIR [...]" >&2
    exit 2
fi
num_processes=$1
shift
port=${PORT:-$((20000 + RANDOM % 20000))}
read -ra command <<<"${CLIP_JAX:-clip-jax}"

pids=()
trap 'kill -TERM "${pids[@]}" 2>/dev/null || true' INT TERM
for ((i = 0; i < num_processes; i++)); do
    "${command[@]}" train "$@" --coordinator="localhost:$port" \
        --num_processes="$num_processes" --process_id="$i" &
    pids+=($!)
done

# A look five times a second: `wait -n` loses one of two that end at the same time.
code=0
while ((${#pids[@]})); do
    running=()
    for pid in "${pids[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then
            running+=("$pid")
            continue
        fi
        status=0
        wait "$pid" || status=$?
        if ((status && !code)); then
            code=$status
        fi
    done
    pids=("${running[@]+"${running[@]}"}")
    # 130: stopped and saved, as the others are about to. Else they wait for one that is gone.
    if ((code && code != 130 && ${#pids[@]})); then
        kill -KILL "${pids[@]}" 2>/dev/null || true
    fi
    sleep 0.2 || true # a Ctrl-C ends it
done
exit "$code"
