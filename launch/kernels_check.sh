#!/usr/bin/env bash
# Loss curves on one GPU with the operators that kernels=auto chooses and with the reference, of the tiny model and of five
# layers of the 7B's width; and what a trained full layer of the 80B's attention shape selects, for the benchmark.
#   launch/kernels_check.sh OUTPUT_FOLDER
# leaves there: ledgers, loss_overlay.png (docs/kernels/ has a copy) and captured_blocks.npz (kernels/ has a copy).
# Checkpoints of up to 13 GB each go to TMPDIR and are deleted. The runs of the 7B's width do not share the GPU with
# others, so that their speeds count.
set -euo pipefail
out=$1
mkdir -p "$out"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

train() { # name, seconds it may take, overrides
    local name=$1 limit=$2
    shift 2
    timeout -k 5 "$limit" python3 train.py "$@" run.dir="$scratch/$name" data.path="$scratch/corpus" \
        logging.tensorboard=false >"$scratch/$name.log" 2>&1 || show "$name: exit $?" "$scratch/$name.log"
    echo "$name: $(grep -om 1 'kernels=auto uses.*' "$scratch/$name.log" || echo 'kernels=reference')"
    cp "$scratch/$name/ledger.jsonl" "$out/$name.jsonl" || true
}

capture() {
    timeout -k 5 60 python3 -m hysparse.capture run="$scratch/moe80b_slice" length=32768 \
        output="$out/captured_blocks.npz" 2>"$scratch/capture.log" || show "capture: exit $?" "$scratch/capture.log"
}

show() { # words, log
    echo "$1"
    tr '\r' '\n' <"$2" | cut -c 1-200 | tail -n 12
}

# More is held out than by default: where Python came without its tests, there is little text.
python3 -m data.prepare input=stdlib output="$scratch/corpus" tokenizer=train:512 validation=0.05 2>&1 | sed -n 3,5p
train moe80b_slice 170 +experiment=moe80b_slice &
train tiny_kernels 100 +experiment=tiny max_steps=80 &
train tiny_reference 100 +experiment=tiny max_steps=80 kernels=reference &
wait
capture &
train dense7b_slice_kernels 100 +experiment=dense7b_slice
rm -rf "$scratch/dense7b_slice_kernels"
train dense7b_slice_reference 100 +experiment=dense7b_slice kernels=reference
wait
python3 - "$out/moe80b_slice.jsonl" <<'PY'
import sys
from hysparse.ledger import latest_by_step, read_ledger
steps = latest_by_step(read_ledger(sys.argv[1]), "step")
print(f"moe80b_slice: {len(steps)} steps, loss {steps[0]['loss']:.4f} to {steps[-1]['loss']:.4f}")
PY
python3 -m docs.loss_overlay "$out"
