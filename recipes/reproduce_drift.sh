#!/usr/bin/env bash
# The paper's comparison (arXiv 2510.15050, tables 2, 3 and 6) with LoRA on one card of 24 GB: a night to train, and as
# long again to ask five models eight benchmarks.
#
#   VLMEVALKIT=../VLMEvalKit bash recipes/reproduce_drift.sh [recipe.yaml] [flags of sft_vlm.py …]
#
# The recipe is configs/qwen2_5_vl_7b_r1.yaml unless named. Its prior and its keep set are made by the first run. Trained
# are SFT, SFT after a fifth of Δ was merged, DRIFT, and DRIFT that keeps the VLM's own answers; each is merged and verified.
# What the recipe says of replay and of merging first does not count. A recipe that names no keep set is refused.
# The same command goes on wherever it was stopped. A run that is finished is named and not done again. One of another
# recipe, or of other flags, is refused. So are answers of an earlier model, or to other settings of VLMEvalKit.
#
#   OUT          folder of all that comes out, runs/reproduce/<name of the recipe> by default
#   PYTHON       with drift_peft[recipes]; python by default
#   VLMEVALKIT   its checkout, as recipes/EVALUATION.md installs it; nothing is asked without it
#   VLMEVAL_PYTHON, LMMS_EVAL_PYTHON   of these tools' own environments; the tripwires are asked if the latter is set
#   DRY_RUN=1    prints the commands, and runs none
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
recipe=$here/configs/qwen2_5_vl_7b_r1.yaml
[[ ${1:-} == *.yaml ]] && recipe=$1 && shift
python=${PYTHON:-python}
out=${OUT:-runs/reproduce/$(basename "$recipe" .yaml)}
[[ $out == /* ]] || out=$PWD/$out
modules=$here${PYTHONPATH:+:$PYTHONPATH}
ways=(sft merged drift drift-keep)
flags=("$@")

run() {
  printf '+%s\n' "$(printf ' %q' "$@")"
  [[ -n ${DRY_RUN:-} ]] || "$@"
}

train() { # name, its settings
  local name=$1 resume=()
  shift
  # sft_vlm.py compares the settings, and does nothing more for a run that is finished.
  if compgen -G "$out/$name/checkpoint-*" > /dev/null || [[ -f $out/$name/run.json ]]; then
    resume=(--resume-from-checkpoint true)
  fi
  run "$python" "$here/sft_vlm.py" --config "$recipe" "${flags[@]}" --output-dir "$out/$name" --merge true --replay 0 \
    "${resume[@]}" "$@"
}

# before a night of training
asked=$(PYTHONPATH=$modules "$python" -m parts.reproduced --config "$recipe" "$@")
[[ -z ${VLMEVALKIT:-} ]] || { read -r settings && read -r kind && read -r base; } <<< "$asked"

train sft --method sft --merge-first null --keep-weight 0
train merged --method sft --merge-first 0.2 --keep-weight 0
train drift --method drift --merge-first null --keep-weight 0
train drift-keep --method drift --merge-first null

if [[ -z ${VLMEVALKIT:-} ]]; then
  echo "The models are in $out/*-merged. To ask them, name VLMEvalKit's checkout: VLMEVALKIT=../VLMEvalKit"
  exit
fi
run env PYTHONPATH="$modules" "$python" -m parts.asked_models "$settings" "$out/vlmevalkit.json" "base=$base" \
  "sft=$out/sft-merged" "merged=$out/merged-merged" "drift=$out/drift-merged" "drift-keep=$out/drift-keep-merged"
(
  run cd "$VLMEVALKIT"
  export PRED_FORMAT=tsv
  run "${VLMEVAL_PYTHON:-$python}" run.py --config "$out/vlmevalkit.json" --mode infer --reuse --work-dir "$out/answers"
)
for pair in sft:drift merged:drift sft:drift-keep; do
  run "$python" "$here/score.py" --base "$out/answers/base" --sft "$out/answers/${pair%:*}" \
    --drift "$out/answers/${pair#*:}" -o "$out/scores-${pair/:/-}.json"
done
if [[ -n ${LMMS_EVAL_PYTHON:-} ]]; then
  for name in base "${ways[@]}"; do
    model=$out/$name-merged
    [[ $name == base ]] && model=$base
    run "$LMMS_EVAL_PYTHON" -m lmms_eval --config "$here/eval/lmms_eval_perception.yaml" --model "$kind" \
      --model_args "pretrained=$model,device_map=auto" --output_path "$out/perception/$name"
  done
fi
