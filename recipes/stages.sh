# Stages of the recipes' run.sh, which sources this file and sets: root, resolved (YAML of the run),
# corpus_dir, first, last, force.
# shellcheck shell=bash disable=SC2154

# value SECTION.KEY: a setting of the run; "none" for null, and the length of a list, whose items are KEY.0, KEY.1, ...
value() { python -c 'import sys, yaml
item = yaml.safe_load(open(sys.argv[1]))
for key in sys.argv[2].split("."):
    item = None if item is None else item[int(key)] if key.isdigit() else item.get(key)
print("none" if item is None else len(item) if isinstance(item, list) else item)' "$resolved" "$1"; }

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

# prepare_stage: the first stage of every recipe. The script of data_prep is named like the folder of the manifests, or like
# the one above it where a corpus has a folder for each language.
prepare_stage() {
  local manifest manifest_dir data_dir languages=() corpus_option=()
  manifest=$(value data.train_manifest)
  manifest_dir=$(dirname "$manifest")
  data_dir=$manifest_dir
  if [[ ! -f $root/data_prep/$(basename "$data_dir").py ]]; then
    languages=(--languages "$(basename "$manifest_dir")") data_dir=$(dirname "$manifest_dir")
  fi
  [[ -z $corpus_dir ]] || corpus_option=(--corpus-dir "$corpus_dir")
  prepare() {
    if [[ ! -f $root/data_prep/$(basename "$data_dir").py ]]; then
      echo "error: no script of data_prep makes $manifest; make it yourself, and begin with --stage 2" >&2
      exit 2
    fi
    python "$root/data_prep/$(basename "$data_dir").py" "${corpus_option[@]}" --output-dir "$data_dir" "${languages[@]}"
  }
  run_stage 1 prepare "$manifest_dir/.stage-prepare.json" "data.train_manifest data.test_manifest" "$manifest_dir" prepare
}
