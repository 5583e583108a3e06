#!/bin/bash
# Mine on a Slurm cluster whose nodes share a file system: one array of shards per stage, then a small job that commits
# it, each waiting for the previous one.
#
#   configs/cluster/slurm.sh CONFIG SHARDS [--set key=value ...]
#
# `negpipe plan CONFIG` shows how many shards are useful. After a failure, or for a corpus that has grown, submit the
# same line again: finished work is not repeated. The options below are for one job; adapt them.
set -euo pipefail

config=${1:?CONFIG SHARDS} shards=${2:?CONFIG SHARDS}
shift 2
negpipe=.venv/bin/negpipe
small=(--cpus-per-task=8 --mem=16G --time=04:00:00 --requeue)
large=(--cpus-per-task=16 --mem=32G --time=08:00:00 --requeue --signal=B:TERM@60)

submit() { # NAME COMMAND, with the options of sbatch in $options; the next job waits for this one
    local after=()
    [[ -z ${last-} ]] || after=(--dependency="afterok:$last" --kill-on-invalid-dep=yes)
    last=$(sbatch --parsable --job-name="negpipe-$1" "${after[@]}" "${options[@]}" --wrap "exec $2")
    last=${last%%;*} # with several clusters, the cluster's name follows
    echo "$1: job $last"
}

arguments=$(printf ' %q' "$config" "$@" --log-format json)
options=("${small[@]}")
submit ingest "$negpipe ingest$arguments"
for stage in encode index slices search triplets; do # slices: only with search.slice_documents
    count=$shards
    # The shards of an approximate index wait for each other (it is trained, filled, tuned): a few suffice.
    [[ $stage != index ]] || count=${INDEX_SHARDS:-1}
    options=("${large[@]}" --array="0-$((count - 1))")
    [[ $stage != encode ]] || options+=(--gres=gpu:1)
    submit "$stage" "$negpipe work $stage$arguments --shard \$SLURM_ARRAY_TASK_ID/$count"
    options=("${small[@]}")
    submit "$stage-commit" "$negpipe commit $stage$arguments --shards $count"
done
