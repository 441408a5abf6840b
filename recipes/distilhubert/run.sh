#!/usr/bin/env bash
# A compact speech encoder (DistilHuBERT, CoLLD) on one dataset, from the corpus to a student, scored where there is a probe section:
#   bash recipes/distilhubert/run.sh DATASET [--corpus-dir DIR] [--stage N] [--stop-stage M] [--force] [--section.key value ...]
# Stages: 1 prepare, 2 states, 3 train, 4 probe. A finished stage is skipped; a killed one carries on.
set -euo pipefail

recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../stages.sh
source "$recipe_dir/../stages.sh"
read_arguments 4 "$@"
resolve
run_dir=$(value trainer.output_dir)

prepare_stage # recipes/distil_whisper prepares the same corpora, and leaves the same stamp
if [[ $(value teacher.states_dir) == none ]]; then
  (( first > 2 || last < 2 )) || echo "stage 2 (states): no teacher.states_dir, the teacher runs in every step"
else # the stores may be shared with other runs, so --force removes none; each teacher and set of layers has its own
  run_stage 2 states "$run_dir/.stage-states.json" "teacher data student loss" "" \
    python "$recipe_dir/store_teacher_states.py" --config "$resolved"
fi
run_stage 3 train "$run_dir/.stage-train.json" "teacher data student loss trainer" "$run_dir" \
  python "$recipe_dir/train.py" --config "$resolved"
probe_stage 4 "teacher data student loss trainer probe"
