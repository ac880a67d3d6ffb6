#!/usr/bin/env bash
# Keeps the ladder's queue running in the background, with the code of the ladder's tag in a worktree of its own.
#   dev/ladder.sh start [WORKERS] [options of scaling run]   begin; text files once by --data FOLDER
#   dev/ladder.sh pause | resume                             before and after anything is timed
#   dev/ladder.sh stop                                       save and end
#   dev/ladder.sh status | fit | report
#   dev/ladder.sh harvest                                    commit finished results
# LADDER is the ladder's file; by default benchmarks/ladder/cpu.yaml. On a machine with a GPU, add --device cuda.
set -euo pipefail
cd "$(dirname "$0")/.."
ladder=$(realpath "${LADDER:-benchmarks/ladder/cpu.yaml}")
out=$PWD/runs/ladder
field() { sed -n "s/^$1: *//p" "$ladder"; }
code=$out/code-$(field tag)
workers() { cat "$out"/worker-*.pid 2>/dev/null || true; }
signal() { for pid in $(workers); do kill "-$1" "$pid" 2>/dev/null || true; done; }

prepare() {  # the tag's code and its environment
    [ -d "$code/.git" ] || [ -f "$code/.git" ] || git worktree add --force --detach "$code" "$(field commit)"
    make --silent -C "$code" .venv/.installed-study
}

start() {
    count=1
    if [[ ${1:-} =~ ^[0-9]+$ ]]; then count=$1; shift; fi
    prepare
    for number in $(seq "$count"); do
        OMP_NUM_THREADS=1 setsid nice -n 19 "$code/.venv/bin/query-experts" scaling run "$ladder" --out "$out" "$@" \
            >"$out/worker-$number.log" 2>&1 &
        echo $! >"$out/worker-$number.pid"
    done
    echo "$count at work; their words are in $out/worker-*.log"
}

case ${1:-} in
    start) shift; start "$@" ;;
    pause) signal STOP ;;
    resume) signal CONT ;;
    stop) signal CONT; signal TERM; rm -f "$out"/worker-*.pid ;;
    status | fit | report) prepare; "$code/.venv/bin/query-experts" scaling "$1" "$ladder" --out "$out" ;;
    harvest) results=$(dirname "$ladder")/$(field results)
        git add "$results"; git commit --quiet --message "Results of the ladder" -- "$results" && git log -1 --oneline ;;
    *) sed -n '2,8s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
