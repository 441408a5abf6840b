#!/usr/bin/env bash
# Language experts and the LoRA baseline on one dataset, from the corpus to scored students:
#   bash recipes/whisper_experts/run.sh DATASET [--corpus-dir DIR] [--adapters "experts lora none"] [--stage N] [--stop-stage M] [--force] [--section.key value ...]
# Stages: 1 prepare, 2 train, 3 evaluate, each adapter in a run folder of its own. A finished stage is skipped; a killed one carries on.
set -euo pipefail

recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../stages.sh
source "$recipe_dir/../stages.sh"

adapters="experts lora" words=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --adapters) [[ $# -ge 2 ]] || fail "$1 needs a value"; adapters=$2; shift 2 ;;
    --student.adapter*) fail "--adapters \"experts lora none\" chooses what is trained" ;;
    *) words+=("$1"); shift ;;
  esac
done
read_arguments 3 "${words[@]}"
resolve
base_dir=$(value trainer.output_dir)
prepare_stage # recipes/distil_whisper prepares the same corpora, and leaves the same stamp
for adapter in $adapters; do
  run_dir=$base_dir-$adapter
  resolve --student.adapter="$adapter" --trainer.output_dir="$run_dir"
  run_stage 2 "train $adapter" "$run_dir/.stage-train.json" "teacher data student loss decoding filters trainer" "$run_dir" \
    python "$recipe_dir/train.py" --config "$resolved"
  run_stage 3 "evaluate $adapter" "$run_dir/.stage-evaluate.json" "teacher data decoding evaluation trainer" \
    "$base_dir-base $run_dir/decoded $run_dir/gated $run_dir/results.json" \
    python "$recipe_dir/evaluate_adapters.py" --config "$resolved"
done
if (( last == 3 )) && [[ $adapters == *" "* ]]; then # the evaluation of one prints its own table
  # shellcheck disable=SC2086
  python "$recipe_dir/tabulate_adapters.py" $(printf "$base_dir-%s " $adapters)
fi
