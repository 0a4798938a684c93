#!/usr/bin/env bash
# Train the tiny model on the GPUs of this machine: one GPU, then two with data, tensor, pipeline, expert and context
# parallelism, and on DeepSpeed where it is installed. All start from the same weights, so the first losses must agree
# to BF16's precision. Then one run is stopped half-way and resumed: its losses must be those of the run that went
# through.
#   launch/gpu_check.sh OUTPUT_FOLDER [max_steps]
set -euo pipefail
out=$1 steps=${2:-40}
gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
mkdir -p "$out"

train() { # name, processes, overrides
    local name=$1 processes=$2
    shift 2
    torchrun --nproc-per-node "$processes" train.py +experiment=tiny run.dir="$out/$name" "$@" >>"$out/$name.log" 2>&1 ||
        { tail -n 40 "$out/$name.log"; exit 1; }
}

check() {
    train "$@" max_steps="$steps"
    python3 - "$1" "$out/$1/ledger.jsonl" <<'PY'
import sys
from hysparse.ledger import latest_by_step, read_ledger
steps = latest_by_step(read_ledger(sys.argv[2]), "step")
first, last = steps[0]["loss"], steps[-1]["loss"]
speed = sorted(step["tokens_per_second"] for step in steps)[len(steps) // 2]
print(f"{sys.argv[1]:<10} first loss {first:.5f}, last {last:.5f}, median {speed:,.0f} tokens/s")
PY
}

check one_gpu 1
train resumed 1 max_steps=$((steps / 2))
check resumed 1
python3 - "$out" <<'PY'
import sys
from hysparse.ledger import latest_by_step, read_ledger
whole, resumed = (
    [step["loss"] for step in latest_by_step(read_ledger(f"{sys.argv[1]}/{name}/ledger.jsonl"), "step")]
    for name in ("one_gpu", "resumed")
)
print("resumed    ", "bit for bit the run that went through" if whole == resumed else "NOT the run that went through")
PY
if [ "$gpus" -ge 2 ]; then
    check data 2
    check tensor 2 parallel.tensor=2
    check pipeline 2 parallel.pipeline=2
    check expert 2 parallel.expert=2
    check context 2 parallel.context=2
    if python3 -c 'import deepspeed' >/dev/null 2>&1; then
        check zero1 2 engine=deepspeed
        check zero3 2 engine=deepspeed deepspeed.zero=3
    fi
fi
