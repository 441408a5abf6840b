# What the recipes' run.sh share: their arguments and their stages. A run.sh sources this file, and calls `read_arguments`
# and `resolve` before any stage.
# shellcheck shell=bash disable=SC2154
root=$(cd "$recipe_dir/../.." && pwd)
resolved=$(mktemp); trap 'rm -f "$resolved"' EXIT # the YAML of the run

fail() { echo "error: $1" >&2; exit 2; }

# The help is the comment at the top of run.sh.
usage() { sed -n '2,4s/^# \{0,1\}//p' "$recipe_dir/run.sh"; exit "$1"; }

# read_arguments LAST_STAGE DATASET [OPTION ...]: sets config (a YAML file), corpus_dir, first, last, force and overrides.
read_arguments() {
  local last_stage=$1 stage; shift
  [[ $# -ge 1 ]] || usage 2
  [[ $1 != -h && $1 != --help ]] || usage 0
  config=$recipe_dir/$1.yaml
  [[ -f $config ]] || fail "no recipe for dataset '$1'; there are: $(cd "$recipe_dir" && ls ./*.yaml | sed 's|./||; s|.yaml||' | tr '\n' ' ')"
  shift
  corpus_dir="" first=1 last=$last_stage force=() overrides=()
  while [[ $# -gt 0 ]]; do
    case $1 in
      --corpus-dir|--stage|--stop-stage)
        [[ $# -ge 2 ]] || fail "$1 needs a value"
        case $1 in --corpus-dir) corpus_dir=$2 ;; --stage) first=$2 ;; --stop-stage) last=$2 ;; esac
        shift 2 ;;
      --force) force=(--force); shift ;;
      *) overrides+=("$1"); shift ;;
    esac
  done
  for stage in "$first" "$last"; do
    [[ $stage =~ ^[0-9]$ ]] && (( stage >= 1 && stage <= last_stage )) || fail "a stage is 1 to $last_stage, not '$stage'"
  done
}

# resolve [OPTION ...]: writes the configuration of the run, with the overrides and these options, where `value` reads it.
resolve() { python "$recipe_dir/train.py" --config "$config" "${overrides[@]}" "$@" --print_config > "$resolved" || exit 2; }

# value SECTION.KEY: a setting of the run; "none" for null, and the length of a list, whose items are KEY.0, KEY.1, ...
value() { python -c 'import sys, yaml
item = yaml.safe_load(open(sys.argv[1]))
for key in sys.argv[2].split("."):
    item = None if item is None else item[int(key)] if key.isdigit() else item.get(key)
print("none" if item is None else len(item) if isinstance(item, list) else item)' "$resolved" "$1"; }

# run_stage NUMBER NAME STAMP "SECTIONS" "OUTPUTS" COMMAND: skips, refuses or runs, and keeps the time. SECTIONS are what the
# result depends on; a name that ends in ? only adds to it, and a run without takes the result as it is.
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

# prepare_stage: the first stage of every recipe. The script of data_prep is named like the folder of the manifests. It is
# named like the one above it where a corpus has a folder for each language, and where a script prepares several corpora.
prepare_stage() {
  local manifest manifest_dir data_dir languages=() corpus_option=()
  manifest=$(value data.train_manifest)
  manifest_dir=$(dirname "$manifest")
  data_dir=$manifest_dir
  if [[ ! -f $root/data_prep/$(basename "$data_dir").py ]]; then
    languages=(--languages "$(basename "$manifest_dir")") data_dir=$(dirname "$manifest_dir")
  elif [[ -f $root/data_prep/$(basename "$(dirname "$manifest_dir")").py ]]; then
    manifest_dir=$(dirname "$manifest_dir") data_dir=$manifest_dir
  fi
  [[ -z $corpus_dir ]] || corpus_option=(--corpus-dir "$corpus_dir")
  prepare() {
    if [[ ! -f $root/data_prep/$(basename "$data_dir").py ]]; then
      fail "no script of data_prep makes $manifest; make it yourself, and begin with --stage 2"
    fi
    python "$root/data_prep/$(basename "$data_dir").py" "${corpus_option[@]}" --output-dir "$data_dir" "${languages[@]}"
  }
  run_stage 1 prepare "$manifest_dir/.stage-prepare.json" "data.train_manifest data.test_manifest" "$manifest_dir" prepare
}

# probe_stage NUMBER "SECTIONS": the last stage of compact encoders, the small SUPERB of the student beside its teacher, filter banks and
# new weights in its shape. Encoders have names of their own, so that tables take the results of several runs.
probe_stage() {
  local name
  if [[ $(value probe) == none ]]; then
    (( last < $1 )) || echo "stage $1 (probe): no probe section, nothing to score"
    return 0
  fi
  name=$(basename "$(dirname "$run_dir")")-$(basename "$run_dir")
  run_stage "$1" probe "$run_dir/.stage-probe.json" "$2" "$run_dir/probes.json" \
    python "$root/recipes/distilhubert/probe.py" --output "$run_dir/probes.json" \
    --fsdd-dir "$(value probe.fsdd_dir)" --barista-dir "$(value probe.barista_dir)" --encoders \
    "teacher=$(value teacher.name)" "$name=$run_dir/student" log-mel=log-mel "fresh-$name=random:$run_dir/student"
}

# transcribe_stage NUMBER: data.label_teacher transcribes every split into data.labels_dir; without one the texts are those of
# the manifests. The stores may be shared with other runs, so --force removes none; they refuse another teacher themselves.
transcribe_stage() {
  local labels_dir
  labels_dir=$(value data.labels_dir)
  if [[ $labels_dir == none ]]; then
    (( first > $1 || last < $1 )) || echo "stage $1 (label): no data.labels_dir, the texts are those of the manifests"
    return 0
  fi
  transcribe() {
    local split manifest
    for split in train test dev; do
      manifest=$(value "data.${split}_manifest")
      [[ $manifest == none ]] ||
        speechkd label --teacher "$(value data.label_teacher)" --whisper-task "$(value decoding.task)" \
          --batch-size "$(value decoding.batch_size)" --max-new-tokens "$(value decoding.max_new_tokens)" \
          --num-workers "$(value decoding.num_workers)" --max-skipped-fraction "$(value data.max_skipped_fraction)" \
          --manifest "$manifest" --output-dir "$labels_dir/$split" --language "$(value decoding.language)"
    done
  }
  run_stage "$1" label "$labels_dir/.stage-transcribe.json" \
    "data.train_manifest data.test_manifest data.dev_manifest data.label_teacher data.max_skipped_fraction decoding" "" transcribe
}
