#!/usr/bin/env bash
# Language experts and the LoRA baseline on one dataset, from the corpus to scored students:
#   bash recipes/whisper_experts/run.sh DATASET [--corpus-dir DIR] [--adapters "experts lora none"] [--stage N] [--stop-stage M] [--force] [--section.key value ...]
# Stages: 1 prepare, 2 train, 3 evaluate, each adapter in a run folder of its own. A finished stage is skipped; a killed one carries on.
set -euo pipefail

recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$recipe_dir/../.." && pwd)
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
value() { python -c 'import sys, yaml
item = yaml.safe_load(open(sys.argv[1]))
for key in sys.argv[2].split("."): item = (item or {}).get(key)
print("none" if item is None else item)' "$resolved" "$1"; }

# run_stage NUMBER NAME STAMP "SECTIONS" "OUTPUTS" COMMAND: skips, refuses or runs, and keeps the time
run_stage() {
  local number=$1 name=$2 stamp=$3 sections=$4 outputs=$5 code=0; shift 5
  (( number >= first && number <= last )) || return 0
  # shellcheck disable=SC2086
  python -m speechkd.stages begin "$stamp" --config "$resolved" --sections $sections --corpus-dir "$corpus_dir" \
    --outputs $outputs "${force[@]}" || code=$?
  if (( code == 10 )); then echo "stage $number ($name): finished before, skipped"; return 0; fi
  (( code == 0 )) || exit "$code"
  echo "stage $number ($name)"
  "$@"
  python -m speechkd.stages end "$stamp"
}

resolve
base_dir=$(value trainer.output_dir)
data_dir=$(dirname "$(value data.train_manifest)")
[[ -f $root/data_prep/$(basename "$data_dir").py ]] || data_dir=$(dirname "$data_dir") # corpora with a folder per language

prepare() {
  local corpus_option=()
  [[ -z $corpus_dir ]] || corpus_option=(--corpus-dir "$corpus_dir")
  python "$root/data_prep/$(basename "$data_dir").py" "${corpus_option[@]}" --output-dir "$data_dir"
}

# the stamp is the one of recipes/distil_whisper, which prepares the same corpora
run_stage 1 prepare "$data_dir/.stage-prepare.json" "data.train_manifest data.test_manifest" "$data_dir" prepare
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
