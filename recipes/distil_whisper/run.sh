#!/usr/bin/env bash
# Distil-Whisper on one dataset, from the corpus to a scored student:
#   bash recipes/distil_whisper/run.sh DATASET [--corpus-dir DIR] [--stage N] [--stop-stage M] [--force] [--section.key value ...]
# Stages: 1 prepare, 2 label, 3 train, 4 evaluate. A finished stage is skipped; a killed one carries on.
set -euo pipefail

recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../stages.sh
source "$recipe_dir/../stages.sh"
read_arguments 4 "$@"
resolve
run_dir=$(value trainer.output_dir)
labels_dir=$(value data.labels_dir)
train_manifest=$(value data.train_manifest)
test_manifest=$(value data.test_manifest)
dev_manifest=$(value data.dev_manifest)
num_extra_corpora=$(value data.extra_corpora)
[[ $num_extra_corpora != none ]] || num_extra_corpora=0

label() {
  local language stored_outputs number extra extra_dir extra_language timestamps=() windows=(--targets text) common
  language=$(value decoding.language) stored_outputs=$(value teacher.stored_outputs)
  common=(--teacher "$(value teacher.name)" --whisper-task "$(value decoding.task)"
    --batch-size "$(value decoding.batch_size)" --max-new-tokens "$(value decoding.max_new_tokens)"
    --num-workers "$(value decoding.num_workers)" --max-skipped-fraction "$(value data.max_skipped_fraction)")
  [[ $(value teacher.cache_encoder_states) != True ]] || windows+=(encoder_states)
  [[ $stored_outputs == none ]] || windows+=("$stored_outputs")
  [[ $(value decoding.timestamps) != True ]] || timestamps=(--timestamps)
  [[ $(value data.pack) != True ]] || windows+=(--pack)
  # label_split MANIFEST OUTPUT_DIR LANGUAGE [MORE OPTIONS]
  label_split() { speechkd label "${common[@]}" "${timestamps[@]}" --manifest "$1" --output-dir "$2" --language "${@:3}"; }
  if [[ $labels_dir == none ]]; then
    echo "no data.labels_dir: training on the manifest's own text"
  else
    label_split "$train_manifest" "$labels_dir/train" "$language" "${windows[@]}"
    label_split "$test_manifest" "$labels_dir/test" "$language"
    [[ $dev_manifest == none ]] || label_split "$dev_manifest" "$labels_dir/dev" "$language" "${windows[@]}"
  fi
  for (( number = 0; number < num_extra_corpora; number++ )); do
    extra=data.extra_corpora.$number
    extra_dir=$(value "$extra.labels_dir") extra_language=$(value "$extra.language")
    [[ $extra_language != none ]] || extra_language=$language
    [[ $extra_dir == none ]] ||
      label_split "$(value "$extra.train_manifest")" "$extra_dir/train" "$extra_language" "${windows[@]}"
  done
}

prepare_stage
run_stage 2 label "$labels_dir/.stage-label.json" \
  "teacher.name teacher.cache_encoder_states? teacher.stored_outputs? data.train_manifest data.test_manifest data.dev_manifest data.extra_corpora data.pack data.max_skipped_fraction decoding" \
  "$labels_dir" label
run_stage 3 train "$run_dir/.stage-train.json" "teacher data student loss decoding filters trainer" "$run_dir" \
  python "$recipe_dir/train.py" --config "$resolved"
run_stage 4 evaluate "$run_dir/.stage-evaluate.json" "teacher data decoding evaluation trainer" \
  "$run_dir/teacher $run_dir/before $run_dir/decoded $run_dir/results.json" \
  python "$recipe_dir/evaluate.py" --config "$resolved"
