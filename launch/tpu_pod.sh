#!/bin/bash
# Run a command on every worker of a TPU pod: request the pod as a queued resource of Google Cloud, install this working
# tree on it, run the command, start over on a new pod after a preemption, and delete the pod at the end.
#
#     launch/tpu_pod.sh --name=mine --zone=us-west4-a --type=v5litepod-16 --runtime=v2-alpha-tpuv5-lite --spot \
#         --setup='sudo mkdir -p /mnt/runs && sudo mount -t nfs 10.0.0.2:/share /mnt/runs' -- \
#         python -m peftjax.train --config=my_config.py --workdir=/mnt/runs/mine --config.mesh.fsdp=-1
#
# See docs/launch_tpu_pod.md.
set -o pipefail

usage="usage: launch/tpu_pod.sh --name=NAME --zone=ZONE --type=TYPE --runtime=VERSION
           [--project=PROJECT] [--spot] [--parts=N] [--setup=COMMAND] [--keep] -- COMMAND ...

  --name       name of the queued resource and its TPU; an existing TPU of this name is reused
  --type       accelerator type: v5litepod-16, v5p-32, v6e-8 ...
  --runtime    runtime version: v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e (v6e), tpu-ubuntu2204-base (v4)
  --spot       use spot capacity: cheaper, but preempted at any time
  --parts      number of TPUs that train a sweep, each one part of it, with the names NAME-1 to NAME-N
  --setup      shell command that every worker runs first, for example to mount the file system of the workdir
  --keep       keep the TPU after a successful run"
name='' zone='' type='' runtime='' setup=true parts=1
keep=false scope=() spot=() given=("$@")
while [ $# -gt 0 ]; do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --runtime=*) runtime=${1#*=} ;;
        --project=*) scope+=("$1") ;;
        --parts=*) parts=${1#*=} ;;
        --setup=*) setup=${1#*=} ;;
        --spot) spot=(--spot) ;;
        --keep) keep=true ;;
        --)
            shift
            break
            ;;
        *)
            echo "unknown option $1"
            echo "$usage"
            exit 2
            ;;
    esac
    shift
done
if [ -z "$name" ] || [ -z "$zone" ] || [ -z "$type" ] || [ -z "$runtime" ] || [ $# -eq 0 ] || [[ ! $parts =~ ^[1-9][0-9]*$ ]]; then
    echo "$usage"
    exit 2
fi
scope+=("--zone=$zone" --quiet)
poll=${TPU_POD_POLL:-60} # seconds between state queries

# Commands for each worker. The process id is stored, so that a running process is stopped before another one starts.
# shellcheck disable=SC2016
stop='pid=$(cat ~/peftjax.pid 2>/dev/null) && kill "$pid" 2>/dev/null && timeout 300 tail --pid="$pid" -f /dev/null; true'
# shellcheck disable=SC2016
install='set -e; mkdir -p peftjax; tar -xzf peftjax.tar.gz -C peftjax; cd peftjax
    python3 -m pip install --quiet --user uv; PATH=$HOME/.local/bin:$PATH
    [ -x .venv/bin/python ] || uv venv --quiet --python ">=3.11,<3.14" .venv
    uv pip install --quiet --editable ".[tpu]"'
run="cd peftjax && export PATH=\$PWD/.venv/bin:\$PATH && echo \$\$ > ~/peftjax.pid && exec $(printf '%q ' "$@")"

say() { echo "$(date +%T) $name: $*"; }

# Start this script for each part. Each starts over, ends and fails without the others, and writes a log of its own.
if [ "$parts" -gt 1 ]; then
    options=("${given[@]:0:${#given[@]}-$#-1}") pods=() code=0
    for part in $(seq "$parts"); do
        "$0" "${options[@]}" --parts=1 --name="$name-$part" -- "$@" "--part=$part/$parts" >"$name-$part.log" 2>&1 &
        pods+=($!)
        say "part $part of $parts: see $name-$part.log"
    done
    trap 'kill "${pods[@]}" 2>/dev/null' INT TERM
    for part in $(seq "$parts"); do
        pod=${pods[part - 1]}
        until wait "$pod"; ended=$?; ! kill -0 "$pod" 2>/dev/null; do :; done # a signal interrupts wait
        say "part $part ended with exit code $ended"
        code=$((ended > code ? ended : code))
    done
    exit "$code"
fi

warn() { say "$@" >&2; }
left() { warn "the TPU is still allocated and billed; to delete it: gcloud compute tpus queued-resources delete $name ${scope[*]} --force"; }

queued() { gcloud compute tpus queued-resources "$1" "$name" "${scope[@]}" "${@:2}"; }
on_all() { gcloud compute tpus tpu-vm ssh "$name" "${scope[@]}" --worker=all --command="$1"; }

# Sets $state; ABSENT if the resource does not exist. Any other error (network, permissions) ends the script.
look() {
    state=$(queued describe --format='value(state.state)' 2>"$errors") && return
    grep -qi 'not.found' "$errors" && state=ABSENT && return
    cat "$errors" >&2
    exit 1
}

# The tracked and untracked files that git does not ignore, which excludes environments and runs. git also lists tracked
# files that have been deleted, at which tar would fail.
files() {
    git -C "$root" ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' file; do
        if [ -e "$root/$file" ]; then printf '%s\0' "$file"; fi
    done
}

prepare() {
    say "installing on every worker"
    files | tar -C "$root" --null -T - -czf "$archive" &&
        on_all "$stop" &&
        gcloud compute tpus tpu-vm scp "$archive" "$name:peftjax.tar.gz" "${scope[@]}" --worker=all &&
        on_all "$install" && on_all "$setup"
}

interrupted() {
    trap '' INT TERM
    code=130
    if [ -n "$running" ]; then
        say "stopping the run; run the same command again to resume"
        on_all "$stop"
        wait "$running"
        code=$?
    fi
    left
    exit "$code"
}

root=$(dirname "$0")/..
errors=$(mktemp) archive=$(mktemp)
trap 'rm -f "$errors" "$archive"' EXIT
trap interrupted INT TERM
state='' running=''
ready=false # whether the working tree is installed on the current TPU
had=false   # whether a TPU was ever active; if so, a failure is not an invalid request
lost=0      # consecutive lost connections
while true; do
    look
    case $state in
        ACTIVE) had=true ;;
        ABSENT)
            say "requesting a $type"
            queued create --node-id="$name" --accelerator-type="$type" --runtime-version="$runtime" "${spot[@]}" || exit
            ready=false
            continue
            ;;
        FAILED | SUSPENDED)
            if [ "$state" = FAILED ] && [ $had = false ]; then
                warn "the request failed:"
                queued describe >&2
                left
                exit 1
            fi
            say "$state, probably preempted; requesting another TPU"
            queued delete --force || exit
            continue
            ;;
        *)
            say "$state"
            sleep "$poll"
            continue
            ;;
    esac

    code=0
    if [ $ready = false ]; then
        prepare || code=$?
        [ $code -eq 0 ] && ready=true
    fi
    if [ $code -eq 0 ]; then
        say "running on every worker: $*"
        on_all "$stop"
        on_all "$run" & # bash handles signals during wait, but not during a foreground command
        running=$!
        wait $running
        code=$?
        running=''
        [ $code -eq 0 ] && break
    fi

    # 75: stopped by SIGTERM with the state saved. 255: lost connection. Anything else is an error, unless the TPU is gone.
    say "ended with exit code $code"
    lost=$((code == 255 ? lost + 1 : 0))
    sleep "$poll"
    look
    if [ "$state" = ACTIVE ] && [ $code -ne 75 ] && { [ $code -ne 255 ] || [ $lost -ge 5 ]; }; then
        left
        exit $code
    fi
done

say "done"
if [ $keep = false ]; then
    queued delete --force
fi
