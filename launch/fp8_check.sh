#!/usr/bin/env bash
# The loss of a small mixture of experts in FP8 beside BF16's, on one GPU with Transformer Engine: five layers with the
# 80B's width and attention, 16 experts, 8,192 tokens a sequence, the same data and the same initial weights.
#   launch/fp8_check.sh OUTPUT_FOLDER [max_steps]
# leaves there: moe80b_slice_fp8.jsonl, moe80b_slice_bf16.jsonl and fp8_overlay.png.
set -euo pipefail
out=$1 steps=${2:-150}
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

python3 -m data.prepare input=stdlib output="$scratch/corpus" tokenizer=train:512 validation=0.05 2>&1 | sed -n 3,5p
for precision in bf16 fp8; do
    name=moe80b_slice_$precision
    python3 train.py +experiment=moe80b_slice precision=$precision max_steps="$steps" run.dir="$scratch/$name" \
        data.path="$scratch/corpus" logging.tensorboard=false checkpoint.every=100000 >"$out/$name.log" 2>&1 ||
        { tr '\r' '\n' <"$out/$name.log" | cut -c 1-200 | tail -n 15; exit 1; }
    grep -o 'experts=.*' "$out/$name.log"
    cp "$scratch/$name/ledger.jsonl" "$out/$name.jsonl"
    rm -rf "${scratch:?}/$name"
done
python3 -m docs.loss_overlay "$out" fp8
