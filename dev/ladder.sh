#!/usr/bin/env bash
# Keeps the ladder's queue running in the background, with the code of the ladder's tag in a worktree of its own.
#   dev/ladder.sh start [WORKERS] [options of scaling run]   add workers; text files once by --data FOLDER
#   dev/ladder.sh pause | resume                             before and after anything is timed
#   dev/ladder.sh stop                                       save and end; returns when all have
#   dev/ladder.sh status | fit | report [options]
#   dev/ladder.sh harvest                                    commit finished results, with the pages' tables and plot
# LADDER is the ladder's file, by default benchmarks/ladder/cpu.yaml. It and FOLDER are paths from the repository's root.
# On a machine with a GPU, add --device cuda.
# Without a tag in the ladder, the code is that of this working tree.
set -euo pipefail
cd "$(dirname "$0")/.."
ladder=${LADDER:-benchmarks/ladder/cpu.yaml}
out=$PWD/runs/ladder
pages=(README.md docs/results.md docs/plots/ladder.svg docs/plots/ladder.png)
fail() { echo "$1" >&2; exit 2; }

field() {  # the value of a key of the ladder's file; empty for none
    local program='import sys, yaml; print(yaml.safe_load(open(sys.argv[1])).get(sys.argv[2]) or "")'
    .venv/bin/python -c "$program" "$ladder" "$1" 2>/dev/null || fail "LADDER is $ladder; it must be a ladder's file"
}

# Workers: worker-N.pid holds the process id of one as long as it lives; stopping-PID says that it was asked to end

is_worker() {  # a process id that another program has by now doesn't count
    [[ "$(ps -ww -o args= -p "$1" 2>/dev/null || true) " == *" scaling run "*" --out $out "* ]]
}

workers() {
    local file pid
    for file in "$out"/worker-*.pid; do
        [ -f "$file" ] || continue
        pid=$(<"$file")
        if is_worker "$pid"; then echo "$pid"; else rm -f "$file" "$out/stopping-$pid"; fi
    done
}

signal() { local pid; for pid in $(workers); do kill "-$1" -- "-$pid" || true; done; }  # and the processes of each

prepare() {  # sets code to the folder of the code that runs, with its environment, and commit to its commit or nothing
    make --silent .venv/.installed-study
    [ -f "$ladder" ] || fail "LADDER is $ladder, which doesn't exist; it must be a ladder's file"
    ladder=$(realpath "$ladder")
    local tag
    tag=$(field tag)
    commit=$(field commit)
    code=$PWD
    [ -n "$tag" ] || return 0
    code=$out/code-$tag
    git cat-file -e "$commit^{commit}" 2>/dev/null || fail "commit of $ladder is '$commit', which this repository lacks"
    [ -e "$code/.git" ] || git worktree add --quiet --force --detach "$code" "$commit"
    if [ -z "$(workers)" ]; then git -C "$code" checkout --quiet --detach "$commit"; fi  # the tag may have moved
    make --silent -C "$code" .venv/.installed-study
}

require_begun() {  # a worker says something once it has begun, or why it hasn't
    local pid log=$out/worker-$1.log
    pid=$(<"$out/worker-$1.pid")
    for _ in $(seq 600); do
        if [ -s "$log" ] || ! kill -0 "$pid" 2>/dev/null; then break; fi
        sleep 0.2
    done
    sleep 0.5
    kill -0 "$pid" 2>/dev/null || fail "worker $1 has ended: $(tail -n 1 "$log")"
}

start() {
    local count=1 number=1
    # Linux weighs a session against others by a nice value of the session's own
    local run='[ ! -e /proc/self/autogroup ] || (echo 19 >/proc/self/autogroup) 2>/dev/null; exec nice -n 19 "$@"'
    if [[ ${1:-} =~ ^[1-9][0-9]*$ ]]; then count=$1; shift; fi
    [[ ${1:---} == --* ]] || fail "WORKERS is $1; it must be a number of workers, 1 or more"
    prepare
    if [ -n "${commit:-}" ] && [ "$(git -C "$code" rev-parse HEAD)" != "$(git rev-parse "$commit^{commit}")" ]; then
        fail "commit of $ladder is '$commit', and workers run another; dev/ladder.sh stop ends them"
    fi
    mkdir -p "$out"
    workers >/dev/null  # removes what dead ones left
    local added=()
    for _ in $(seq "$count"); do
        while [ -e "$out/worker-$number.pid" ]; do number=$((number + 1)); done
        OMP_NUM_THREADS=1 setsid bash -c "$run" run "$code/.venv/bin/query-experts" scaling run "$ladder" --out "$out" \
            "$@" >"$out/worker-$number.log" 2>&1 &
        echo $! >"$out/worker-$number.pid"
        added+=("$number")
    done
    for number in "${added[@]}"; do require_begun "$number"; done
    echo "$count added; the words of all are in $out/worker-*.log"
}

stop() {
    signal CONT
    local pid
    for pid in $(workers); do
        [ ! -e "$out/stopping-$pid" ] || continue  # a second signal would end it before it has saved
        touch "$out/stopping-$pid"
        kill -TERM "$pid" || true  # it passes it on to its own processes
    done
    echo "Waiting until $(workers | wc -l) have saved."
    while [ -n "$(workers)" ]; do sleep 0.5; done
}

harvest() {
    prepare
    local name results
    name=$(field results)
    [ -n "$name" ] || fail "LADDER is $ladder; it must be a ladder's file, with results"
    results=$(realpath -m "$(dirname "$ladder")/$name")
    [ -d "$results" ] || fail "results is $results, where no run has finished yet"
    [[ $results == "$(pwd -P)"/* ]] || fail "results is $results; to be committed it must be within this repository"
    scaling . status >/dev/null  # refuses damaged results
    git diff --quiet HEAD -- "${pages[@]}" || fail "${pages[*]} have changes, which must be committed or taken back first"
    git add -- "$results/*.json"
    if git diff --cached --quiet -- "$results"; then echo "No new results."; return; fi
    .venv/bin/python benchmarks/ladder_tables.py
    git commit --quiet --message "Results of the ladder" -- "$results" "${pages[@]}"
    git log -1 --oneline
}

usage() { sed -n '2,10s/^# \{0,1\}//p' "$0"; }
scaling() { "$1/.venv/bin/query-experts" scaling "$2" "$ladder" --out "$out" "${@:3}"; }

case ${1:-} in
    start) shift; start "$@" ;;
    pause) signal STOP; echo "$(workers | wc -l) paused" ;;
    resume) signal CONT; echo "$(workers | wc -l) at work" ;;
    stop) stop ;;
    status) prepare; scaling "$code" "$@" ;;  # where checkpoints are is known to the code that wrote them
    fit | report) prepare; scaling . "$@" ;;
    harvest) harvest ;;
    -h | --help | help) usage ;;
    *) usage; exit 2 ;;
esac
