#!/usr/bin/env bash
# A pruned speech encoder (DPHuBERT) on one dataset, from the corpus to a student, scored where there is a probe section:
#   bash recipes/dphubert/run.sh DATASET [--corpus-dir DIR] [--stage N] [--stop-stage M] [--force] [--section.key value ...]
# Stages: 1 prepare, 2 prune, 3 distil, 4 probe. A finished stage is skipped; a killed one carries on.
set -euo pipefail

recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../stages.sh
source "$recipe_dir/../stages.sh"
read_arguments 4 "$@"
resolve
run_dir=$(value trainer.output_dir)

prepare_stage # recipes/distil_whisper prepares the same corpora, and leaves the same stamp
run_stage 2 prune "$run_dir-pruned/.stage-train.json" "teacher data pruning loss trainer" "$run_dir-pruned" \
  python "$recipe_dir/train.py" --config "$resolved" --step prune
run_stage 3 distil "$run_dir/.stage-train.json" "teacher data pruning loss final trainer" "$run_dir" \
  python "$recipe_dir/train.py" --config "$resolved" --step distil
probe_stage 4 "teacher data pruning loss final trainer probe"
