#!/usr/bin/env bash
# MVQ on one dataset, from the corpus to a small recogniser that is scored:
#   bash recipes/mvq/run.sh DATASET [--corpus-dir DIR] [--stage N] [--stop-stage M] [--force] [--section.key value ...]
# Stages: 1 prepare, 2 label, 3 encode, 4 train, 5 evaluate. A finished stage is skipped; a killed one carries on.
set -euo pipefail

recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../stages.sh
source "$recipe_dir/../stages.sh"
read_arguments 5 "$@"
resolve
run_dir=$(value trainer.output_dir)

prepare_stage # recipes/distil_whisper prepares the same corpora, and leaves the same stamp
transcribe_stage 2
if [[ $(value loss.kd) == none ]]; then # quantizer and stores may be shared with other runs too
  (( first > 3 || last < 3 )) || echo "stage 3 (encode): loss.kd is none, there is no teacher to run"
else
  run_stage 3 encode "$run_dir/.stage-encode.json" \
    "data.train_manifest data.dev_manifest data.max_skipped_fraction teacher quantizer loss.kd" "" \
    python "$recipe_dir/encode_teacher.py" --config "$resolved"
fi
run_stage 4 train "$run_dir/.stage-train.json" "teacher data tokens student loss filters trainer" "$run_dir" \
  python "$recipe_dir/train.py" --config "$resolved"
run_stage 5 evaluate "$run_dir/.stage-evaluate.json" "data trainer recognition evaluation" \
  "$run_dir/results.json $run_dir/metrics.json" python "$recipe_dir/recognize.py" --config "$resolved"
