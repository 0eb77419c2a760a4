#!/bin/bash
# Run a command on every worker of a TPU pod: ask for it in Google Cloud's queue, install this working tree there, run,
# begin again on a new one if it is preempted, and delete it in the end.
#
#     launch/tpu_pod.sh --name=mine --zone=us-west4-a --type=v5litepod-16 --runtime=v2-alpha-tpuv5-lite --spot \
#         --setup='sudo mkdir -p /mnt/runs && sudo mount -t nfs 10.0.0.2:/share /mnt/runs' -- \
#         python -m peftjax.train --config=my_config.py --workdir=/mnt/runs/mine --config.mesh.fsdp=-1
#
# docs/launch_tpu_pod.md tells more.
set -o pipefail

usage="usage: launch/tpu_pod.sh --name=NAME --zone=ZONE --type=TYPE --runtime=VERSION
           [--project=PROJECT] [--spot] [--setup=COMMAND] [--keep] -- COMMAND ...

  --name       of the queued resource and of its TPU; the same name goes on with the TPU that is there
  --type       v5litepod-16, v5p-32, v6e-8 ...
  --runtime    v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv5 (v5p), v2-alpha-tpuv6e (v6e), tpu-ubuntu2204-base (v4)
  --spot       cheaper, and may be taken away at any time
  --setup      a shell command for each worker before the run: mount what holds the workdir
  --keep       do not delete the TPU after a run that ended well"
name='' zone='' type='' runtime='' setup=true
keep=false scope=() spot=()
while [ $# -gt 0 ]; do
    case $1 in
        --name=*) name=${1#*=} ;;
        --zone=*) zone=${1#*=} ;;
        --type=*) type=${1#*=} ;;
        --runtime=*) runtime=${1#*=} ;;
        --project=*) scope+=("$1") ;;
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
if [ -z "$name" ] || [ -z "$zone" ] || [ -z "$type" ] || [ -z "$runtime" ] || [ $# -eq 0 ]; then
    echo "$usage"
    exit 2
fi
scope+=("--zone=$zone" --quiet)
poll=${TPU_POD_POLL:-60} # seconds between two looks at the state

# What each worker does. The number of its process is kept, so that no second one is ever started beside it.
# shellcheck disable=SC2016
stop='pid=$(cat ~/peftjax.pid 2>/dev/null) && kill "$pid" 2>/dev/null && timeout 300 tail --pid="$pid" -f /dev/null; true'
# shellcheck disable=SC2016
install='set -e; mkdir -p peftjax; tar -xzf peftjax.tar.gz -C peftjax; cd peftjax
    python3 -m pip install --quiet --user uv; PATH=$HOME/.local/bin:$PATH
    [ -x .venv/bin/python ] || uv venv --quiet --python ">=3.11,<3.14" .venv
    uv pip install --quiet --editable ".[tpu]"'
run="cd peftjax && export PATH=\$PWD/.venv/bin:\$PATH && echo \$\$ > ~/peftjax.pid && exec $(printf '%q ' "$@")"

say() { echo "$(date +%T) $name: $*"; }
warn() { say "$@" >&2; }
left() { warn "the TPU is still there, and paid for: gcloud compute tpus queued-resources delete $name ${scope[*]} --force"; }

queued() { gcloud compute tpus queued-resources "$1" "$name" "${scope[@]}" "${@:2}"; }
on_all() { gcloud compute tpus tpu-vm ssh "$name" "${scope[@]}" --worker=all --command="$1"; }

# Sets $state, to ABSENT where there is nothing of this name; no answer at all (no network, no rights) ends the script.
look() {
    state=$(queued describe --format='value(state.state)' 2>"$errors") && return
    grep -qi 'not.found' "$errors" && state=ABSENT && return
    cat "$errors" >&2
    exit 1
}

# Sends what git knows or would add, as it is now: no environment, no runs.
prepare() {
    say "installing on every worker"
    git -C "$root" ls-files -z --cached --others --exclude-standard |
        tar -C "$root" --null -T - -czf "$archive" &&
        on_all "$stop" &&
        gcloud compute tpus tpu-vm scp "$archive" "$name:peftjax.tar.gz" "${scope[@]}" --worker=all &&
        on_all "$install" && on_all "$setup"
}

interrupted() {
    trap '' INT TERM
    code=130
    if [ -n "$running" ]; then
        say "stopping the run; the same command goes on with it"
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
ready=false # whether this script installed on the TPU that is there
had=false   # whether there was one: then it is not the request that is at fault
lost=0      # connections lost in a row
while true; do
    look
    case $state in
        ACTIVE) had=true ;;
        ABSENT)
            say "asking for a $type"
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
            say "$state, as after a preemption: asking for another"
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
        on_all "$run" & # a signal reaches this script while it waits, not while it runs a command
        running=$!
        wait $running
        code=$?
        running=''
        [ $code -eq 0 ] && break
    fi

    # 75: stopped by SIGTERM, all saved. 255: no connection. Else a mistake, unless it was the TPU's end.
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
