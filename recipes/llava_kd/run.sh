#!/usr/bin/env bash
# LLaVA-KD on one dataset: from pictures to a small multimodal model, in stages, scored by whole answers:
#   bash recipes/llava_kd/run.sh DATASET [--corpus-dir DIR] [--stage N] [--stop-stage M] [--force] [--section.key value ...]
# Stages: 1 prepare, 2 teacher, 3 states, 4 train, 5 evaluate. A finished stage is skipped; a killed one carries on.
set -euo pipefail

recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=../stages.sh
source "$recipe_dir/../stages.sh"
read_arguments 5 "$@"
resolve
run_dir=$(value trainer.output_dir)

prepare_stage

# A dataset may come with the configuration of its teacher, which is made where there is none under its name.
teacher_config=${config%.yaml}_teacher.yaml teacher=$(value teacher.name)
if [[ -f $teacher_config && ! -d $teacher && $teacher == */student ]]; then
  teacher_dir=${teacher%/student}
  teach() {
    python "$recipe_dir/train.py" --config "$teacher_config" --trainer.output_dir "$teacher_dir"
    python "$recipe_dir/evaluate_answers.py" --config "$teacher_config" --trainer.output_dir "$teacher_dir"
  }
  run_stage 2 teacher "$teacher_dir/.stage-train.json" "data.train_manifest data.independent" "$teacher_dir" teach
elif (( first <= 2 && last >= 2 )); then
  echo "stage 2 (teacher): takes $teacher"
fi

if [[ $(value teacher.stored) == True ]]; then
  run_stage 3 states "$(value data.labels_dir)/.stage-states.json" "teacher data stages student.tokenizer" "$(value data.labels_dir)" \
    python "$recipe_dir/store_states.py" --config "$resolved"
elif (( first <= 3 && last >= 3 )); then
  echo "stage 3 (states): the teacher runs beside the student, nothing to store"
fi

run_stage 4 train "$run_dir/.stage-train.json" "teacher data student stages trainer" "$run_dir" \
  python "$recipe_dir/train.py" --config "$resolved"
run_stage 5 evaluate "$run_dir/.stage-evaluate.json" "teacher data student stages trainer" "$run_dir/metrics.json" \
  python "$recipe_dir/evaluate_answers.py" --config "$resolved"
