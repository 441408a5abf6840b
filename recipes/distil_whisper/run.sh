#!/usr/bin/env bash
# Distil-Whisper on one dataset, from the corpus to a scored student:
#   bash recipes/distil_whisper/run.sh DATASET [--corpus-dir DIR] [--stage N] [--stop-stage M] [--force] [--section.key value ...]
# Stages: 1 prepare, 2 label, 3 train, 4 evaluate. A finished stage is skipped; a killed one carries on.
set -euo pipefail

recipe_dir=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$recipe_dir/../.." && pwd)
usage() { sed -n '2,4s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit "$1"; }

[[ $# -ge 1 ]] || usage 2
[[ $1 != -h && $1 != --help ]] || usage 0
dataset=$1; shift
config=$recipe_dir/$dataset.yaml
if [[ ! -f $config ]]; then
  echo "error: no recipe for dataset '$dataset'; there are: $(cd "$recipe_dir" && ls ./*.yaml | sed 's|./||; s|.yaml||' | tr '\n' ' ')" >&2
  exit 2
fi

corpus_dir="" first=1 last=4 force=() overrides=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --corpus-dir|--stage|--stop-stage)
      [[ $# -ge 2 ]] || { echo "error: $1 needs a value" >&2; exit 2; }
      case $1 in --corpus-dir) corpus_dir=$2 ;; --stage) first=$2 ;; --stop-stage) last=$2 ;; esac
      shift 2 ;;
    --force) force=(--force); shift ;;
    *) overrides+=("$1"); shift ;;
  esac
done
for stage in "$first" "$last"; do
  [[ $stage =~ ^[1-4]$ ]] || { echo "error: a stage is 1, 2, 3 or 4, not '$stage'" >&2; exit 2; }
done

resolved=$(mktemp); trap 'rm -f "$resolved"' EXIT
python "$recipe_dir/train.py" --config "$config" "${overrides[@]}" --print_config > "$resolved" || exit 2
value() { python -c 'import sys, yaml
item = yaml.safe_load(open(sys.argv[1]))
for key in sys.argv[2].split("."):
    item = None if item is None else item[int(key)] if key.isdigit() else item.get(key)
print("none" if item is None else len(item) if isinstance(item, list) else item)' "$resolved" "$1"; }
run_dir=$(value trainer.output_dir)
labels_dir=$(value data.labels_dir)
train_manifest=$(value data.train_manifest)
test_manifest=$(value data.test_manifest)
dev_manifest=$(value data.dev_manifest)
num_extra_corpora=$(value data.extra_corpora)
[[ $num_extra_corpora != none ]] || num_extra_corpora=0
manifest_dir=$(dirname "$train_manifest")
data_dir=$manifest_dir languages=()
if [[ ! -f $root/data_prep/$(basename "$data_dir").py ]]; then   # a corpus with a folder for each language
  languages=(--languages "$(basename "$manifest_dir")") data_dir=$(dirname "$manifest_dir")
fi
corpus=$(basename "$data_dir")

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

prepare() {
  local corpus_option=()
  if [[ ! -f $root/data_prep/$corpus.py ]]; then
    echo "error: no script of data_prep makes $train_manifest; make it yourself, and begin with --stage 2" >&2
    exit 2
  fi
  [[ -z $corpus_dir ]] || corpus_option=(--corpus-dir "$corpus_dir")
  python "$root/data_prep/$corpus.py" "${corpus_option[@]}" --output-dir "$data_dir" "${languages[@]}"
}

label() {
  local language number extra extra_dir extra_language timestamps=() windows=(--targets text) common
  language=$(value decoding.language)
  common=(--teacher "$(value teacher.name)" --whisper-task "$(value decoding.task)"
    --batch-size "$(value decoding.batch_size)" --max-new-tokens "$(value decoding.max_new_tokens)"
    --num-workers "$(value decoding.num_workers)" --max-skipped-fraction "$(value data.max_skipped_fraction)")
  [[ $(value teacher.cache_encoder_states) != True ]] || windows+=(encoder_states)
  [[ $(value teacher.stored_topk) != True ]] || windows+=(topk)
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

run_stage 1 prepare "$manifest_dir/.stage-prepare.json" "data.train_manifest data.test_manifest" "$manifest_dir" prepare
run_stage 2 label "$labels_dir/.stage-label.json" \
  "teacher data.train_manifest data.test_manifest data.dev_manifest data.extra_corpora data.pack data.max_skipped_fraction decoding" \
  "$labels_dir" label
run_stage 3 train "$run_dir/.stage-train.json" "teacher data student loss decoding filters trainer" "$run_dir" \
  python "$recipe_dir/train.py" --config "$resolved"
run_stage 4 evaluate "$run_dir/.stage-evaluate.json" "teacher data decoding evaluation trainer" \
  "$run_dir/teacher $run_dir/before $run_dir/decoded $run_dir/results.json" \
  python "$recipe_dir/evaluate.py" --config "$resolved"
