#!/usr/bin/env bash
# SEGUE on one dataset, from the corpus to a speech encoder that is scored:
#   bash recipes/segue/run.sh DATASET [--corpus-dir DIR] [--stage N] [--stop-stage M] [--force] [--section.key value ...]
# Stages: 1 prepare, 2 label, 3 embed, 4 train, 5 evaluate, 6 understand. A finished stage is skipped; a killed one carries on.
set -euo pipefail

recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../stages.sh
source "$recipe_dir/../stages.sh"
read_arguments 6 "$@"
resolve
run_dir=$(value trainer.output_dir)

prepare_stage # recipes/distil_whisper prepares the same corpora, and leaves the same stamp
transcribe_stage 2
run_stage 3 embed "$run_dir/.stage-embed.json" \
  "data.train_manifest data.test_manifest data.dev_manifest data.labels_dir data.max_skipped_fraction teacher student" "" \
  python "$recipe_dir/store_targets.py" --config "$resolved"
run_stage 4 train "$run_dir/.stage-train.json" "teacher data student loss filters trainer" "$run_dir" \
  python "$recipe_dir/train.py" --config "$resolved"
run_stage 5 evaluate "$run_dir/.stage-evaluate.json" "teacher data student trainer" \
  "$run_dir/results.json $run_dir/retrieval.json" python "$recipe_dir/evaluate_embeddings.py" --config "$resolved"
if [[ $(value understanding) == none ]]; then
  (( last < 6 )) || echo "stage 6 (understand): no understanding section, nothing to ask"
else
  run_stage 6 understand "$run_dir/.stage-understand.json" "teacher data student understanding trainer" \
    "$run_dir/understanding.json" python "$recipe_dir/understand.py" --config "$resolved"
fi
