#!/usr/bin/env bash
# Makes the runs of study.csv, two at a time, each on one thread.
#
#     bash results/study.sh list           # prints the commands of all runs
#     bash results/study.sh list toy 20    # those of a task and a seed, or of seeds 40-49
#     bash results/study.sh toy 20         # makes these; the same again goes on where it was
#     bash results/study.sh                # makes all: about fifteen hours on two cores
#
# What arms.csv has a `change` for is left out: it is made otherwise (see README.md).
# A run is written to runs/study/TASK/seedK/ARM, and what it printed to ARM.log beside it.
set -euo pipefail
cd "$(dirname "$0")/.."
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

runs() {  # task, seed, arm and flags of every run that is asked for, a line each, seed by seed
    tail -n +2 results/arms.csv | while IFS=, read -r task arm seeds change _ flags; do
        wanted=${2:-0-999}
        for range in $seeds; do
            for seed in $(seq "${range%-*}" "${range#*-}"); do
                if [ -z "$change" ] && [ "${1:-$task}" = "$task" ] \
                    && [ "$seed" -ge "${wanted%-*}" ] && [ "$seed" -le "${wanted#*-}" ]; then
                    echo "$task $seed $arm $flags"
                fi
            done
        done
    done | sort -s -k 1,1 -k 2,2n
}
stages() {  # the command that makes SFT and RM, of each task and seed; programs need no RM
    runs "$@" | cut -d " " -f 1,2 | sort -u | while read -r task seed; do
        out=runs/study/$task/seed$seed
        same="--task $task --seed $seed --resume auto"
        command="python sft.py $same --out $out/sft"
        if [ "$task" = toy ]; then
            command+=" && python reward.py $same --sft $out/sft --out $out/reward"
        fi
        echo "mkdir -p $out && ($command) >> $out/stages.log 2>&1"
    done
}

policies() {  # the command of each run
    runs "$@" | while read -r task seed arm flags; do
        out=runs/study/$task/seed$seed
        start="--sft $out/sft"
        if [ "$task" = toy ]; then
            start+=" --reward_model $out/reward"
        fi
        command="python ma_ppo.py --task $task --seed $seed $flags $start --out $out/$arm"
        echo "$command --resume auto >> $out/$arm.log 2>&1"
    done
}

if [ "${1:-}" = list ]; then
    stages "${@:2}"
    policies "${@:2}"
else
    stages "$@" | xargs -P 2 -I {} sh -c "{}"
    policies "$@" | xargs -P 2 -I {} sh -c "{}"
fi
