#!/usr/bin/env bash
# Language experts and the LoRA baseline on one dataset, from the corpus to scored students:
#   bash recipes/whisper_experts/run.sh DATASET [--corpus-dir DIR] [--adapters "experts lora none"] [--stage N] [--stop-stage M] [--force] [--section.key value ...]
# Stages: 1 prepare, 2 train, 3 evaluate, each adapter in a run folder of its own. A finished stage is skipped; a killed one carries on.
set -euo pipefail

recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$recipe_dir/../.." && pwd)
# shellcheck source=../stages.sh
source "$root/recipes/stages.sh"
usage() { sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit "$1"; }
fail() { echo "error: $1" >&2; exit 2; }

[[ $# -ge 1 ]] || usage 2
[[ $1 != -h && $1 != --help ]] || usage 0
dataset=$1; shift
config=$recipe_dir/$dataset.yaml
[[ -f $config ]] || fail "no recipe for dataset '$dataset'; there are: $(cd "$recipe_dir" && ls ./*.yaml | sed 's|./||; s|.yaml||' | tr '\n' ' ')"

corpus_dir="" adapters="experts lora" first=1 last=3 force=() overrides=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --corpus-dir|--adapters|--stage|--stop-stage)
      [[ $# -ge 2 ]] || fail "$1 needs a value"
      case $1 in --corpus-dir) corpus_dir=$2 ;; --adapters) adapters=$2 ;; --stage) first=$2 ;; --stop-stage) last=$2 ;; esac
      shift 2 ;;
    --force) force=(--force); shift ;;
    --student.adapter*) fail "--adapters \"experts lora none\" chooses what is trained" ;;
    *) overrides+=("$1"); shift ;;
  esac
done
for stage in "$first" "$last"; do
  [[ $stage =~ ^[1-3]$ ]] || fail "a stage is 1, 2 or 3, not '$stage'"
done

resolved=$(mktemp); trap 'rm -f "$resolved"' EXIT
resolve() { python "$recipe_dir/train.py" --config "$config" "${overrides[@]}" "$@" --print_config > "$resolved" || exit 2; }
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
