#!/usr/bin/env bash
# Train the tiny model on the GPUs of this machine: one GPU, then two with data, tensor, pipeline and expert parallelism.
# All start from the same weights, so the first losses must agree to BF16's precision.
#   launch/gpu_check.sh OUTPUT_FOLDER [max_steps]
set -euo pipefail
out=$1 steps=${2:-40}
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
run() { # name, processes, overrides
    local name=$1 processes=$2
    shift 2
    torchrun --nproc-per-node "$processes" train.py +experiment=tiny run.dir="$out/$name" max_steps="$steps" "$@" \
        >"$out/$name.log" 2>&1 || { tail -n 40 "$out/$name.log"; exit 1; }
    python3 - "$name" "$out/$name/ledger.jsonl" <<'PY'
import json, sys
steps = [r for r in map(json.loads, open(sys.argv[2])) if r["kind"] == "step"]
print(f"{sys.argv[1]:<12} first loss {steps[0]['loss']:.5f}, last {steps[-1]['loss']:.5f}, {steps[-1]['tokens_per_second']:,.0f} tokens/s")
PY
}
mkdir -p "$out"
run one_gpu 1
if [ "$gpus" -ge 2 ]; then
    run data 2
    run tensor 2 parallel.tensor=2
    run pipeline 2 parallel.pipeline=2
    run expert 2 parallel.expert=2
fi
