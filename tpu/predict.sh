#!/usr/bin/env bash
# Compiles the train step of twelve points of the papers' table for the slices that people rent, and keeps what the
# compiled programs say. Needs no TPU; about four minutes a point on two CPU cores.
#
#   pip install -e '.[tpu]' && tpu/predict.sh
set -euo pipefail
cd "$(dirname "$0")/.."
mkdir -p tpu/predictions

point() { # NAME SIZE SLICE FLAG...
  local name=$1 size=$2 slice=$3 family output
  shift 3
  for family in vanilla mesh spiral_b spiral_l; do
    output=tpu/predictions/$name-$family.json
    [ -e "$output" ] && continue
    "${PYTHON:-python}" -m spiral_jax.aot --config="experiments/pile.py:$size,$family" --topology="$slice" "$@" \
      --output="$output"
  done
}

point 160m-v5e-4x4 160m v5e:4x4 --config.train.accumulation=4 --config.model.remat=keep_inputs
point 1.4b-v5p-4x4x4 1.4b v5p:4x4x4 --config.train.accumulation=2 --config.model.remat=keep_all \
  --config.train.gather_core=step
point 1.4b-v6e-8x8 1.4b v6e:8x8 --config.train.accumulation=2 --config.model.remat=keep_inputs
