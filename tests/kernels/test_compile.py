"""The kernels compile for Hopper without a GPU, use its matrix instructions, and fit its registers."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")

SHARED_LIMIT = 227 * 1024  # bytes that one CTA can have
# Registers a thread may use: 255 is what the hardware has; with 170, three CTAs of four warps fit a multiprocessor.
MATRIX_KERNELS = {  # those whose tiles must go to the tensor cores by wgmma
    ("causal_forward", "_hopper_forward_kernel"): 168,  # of 12 and 16 warps, which share them out unequally
    ("causal_forward", "_forward_kernel"): 255,
    ("scored_forward", "_hopper_forward_kernel"): 128,
    ("scored_forward", "_forward_kernel"): 255,
    ("causal_backward", "_hopper_backward_kernel"): 168,  # of 12 warps, which share them out unequally
    ("causal_backward", "_query_gradient_kernel"): 255,
    ("causal_backward", "_key_gradient_kernel"): 255,
    ("window", "_forward_kernel"): 170,
    ("window", "_query_gradient_kernel"): 170,
    ("window", "_key_gradient_kernel"): 255,
    ("sparse", "hopper_choice_outputs_kernel"): 168,
    ("sparse", "_choice_outputs_kernel"): 220,
    ("sparse", "_output_kernel"): 255,
    ("sparse", "hopper_choice_gradients_kernel"): 255,
    ("sparse", "_choice_gradients_kernel"): 255,
    ("sparse", "_query_kernel"): 170,
    ("sparse", "_key_gradient_kernel"): 255,
    ("wide_sparse", "_choice_outputs_kernel"): 220,
    ("wide_sparse", "_output_kernel"): 255,
    ("wide_sparse", "_choice_gradients_kernel"): 255,
    ("wide_sparse", "_query_kernel"): 255,
    ("wide_sparse", "_key_gradient_kernel"): 255,
    ("grouped", "_rows_kernel"): 168,  # of 12 warps, which share them out unequally
    ("grouped", "_weights_kernel"): 168,
}
OTHER_KERNELS = {  # bound by memory, or with too few rows for wgmma: a decoding step has 16
    ("causal_backward", "_delta_kernel"): 64,
    ("causal_backward", "_pack_kernel"): 64,
    ("window", "_pack_kernel"): 64,
    ("sparse", "_pack_kernel"): 64,
    ("sparse", "_cells_kernel"): 64,
    ("sparse", "_narrow_kernel"): 64,
    ("sparse", "_bounds_kernel"): 64,
    ("sparse", "_pieces_kernel"): 64,
    ("sparse", "_rows_kernel"): 64,
    ("sparse", "_weights_kernel"): 64,
    ("sparse", "_add_pieces_kernel"): 176,
    ("wide_sparse", "_pack_kernel"): 64,
    ("wide_sparse", "_cells_kernel"): 64,
    ("wide_sparse", "_narrow_kernel"): 64,
    ("wide_sparse", "_bounds_kernel"): 64,
    ("wide_sparse", "_pieces_kernel"): 64,
    ("wide_sparse", "_rows_kernel"): 64,
    ("wide_sparse", "_weights_kernel"): 64,
    ("wide_sparse", "_add_pieces_kernel"): 255,
    ("decode", "split_kernel"): 170,
    ("decode", "combine_kernel"): 64,
    ("decode", "sparse_kernel"): 255,
    ("rotary", "_forward"): 64,
    ("rotary", "_backward"): 64,
    ("experts", "_route"): 128,  # of one warp: sixteen programs a multiprocessor
    ("experts", "_place"): 80,
    ("experts", "_route_backward"): 128,
    ("experts", "_spread"): 64,
    ("experts", "_add_counts"): 64,
    ("experts", "_sum"): 64,
    ("experts", "_swiglu"): 64,
    ("experts", "_swiglu_backward"): 80,
    ("grouped", "_table"): 64,
}
ELSEWHERE = ("_choice_outputs_kernel", "_choice_gradients_kernel")  # for what is not the shape of the paper
PLAIN_KERNELS = {  # the same without sinks and gates, with and without a window
    ("plain_sparse", kernel): registers
    for (operator, kernel), registers in (MATRIX_KERNELS | OTHER_KERNELS).items()
    if operator == "sparse" and kernel not in ELSEWHERE
}
BUDGET = MATRIX_KERNELS | OTHER_KERNELS | PLAIN_KERNELS
IN_LOOPS = {  # accesses: a few registers go to the stack and back in a step
    ("causal_backward", "_hopper_backward_kernel"): 15,  # in three loops together
    ("sparse", "_choice_gradients_kernel"): 6,
    ("sparse", "hopper_choice_gradients_kernel"): 4,
    ("plain_sparse", "hopper_choice_gradients_kernel"): 4,
    ("wide_sparse", "_choice_gradients_kernel"): 10,
}
SPILLED = {  # bytes a thread may keep on its stack, outside of matrix loops
    ("sparse", "_output_kernel"): 24,
    ("plain_sparse", "_output_kernel"): 8,
    ("sparse", "_choice_gradients_kernel"): 24,
    ("plain_sparse", "hopper_choice_gradients_kernel"): 8,
    ("sparse", "hopper_choice_gradients_kernel"): 8,  # of the branch with element masks
    ("wide_sparse", "_output_kernel"): 16,
    ("wide_sparse", "_choice_gradients_kernel"): 24,
    ("causal_backward", "_hopper_backward_kernel"): 72,
    ("rotary", "_backward"): 8,
    ("scored_forward", "_hopper_forward_kernel"): 40,
}
OVERLAPPING = ("experts", "grouped")  # operators whose kernels may start before what is ahead can be read
PARTITIONS = {"_rows_kernel": 4, "_weights_kernel": 3}  # kinds of warps of "grouped", each of which has to wait
pytestmark = pytest.mark.slow  # about a minute on one core


@pytest.fixture(scope="module")
def kernels(tmp_path_factory) -> list[dict]:
    """What `python -m kernels.compile_sm90` found. In another process: this one may interpret its kernels."""
    table = tmp_path_factory.mktemp("compile") / "table.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "kernels.compile_sm90", "--json", str(table)]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(table.read_text())


def named(kernels: list[dict]) -> list[tuple[tuple[str, str], dict]]:
    return [((kernel["operator"], kernel["kernel"]), kernel) for kernel in kernels]


def listed(kernels: list[dict], *, over: str, limit: Callable[[tuple[str, str]], int]) -> list[str]:
    """Those whose `over` is larger than the limit, in words."""
    return [
        f"{'.'.join(name)} {kernel['shape']}: {over} {kernel[over]}"
        for name, kernel in named(kernels)
        if kernel[over] > limit(name)
    ]


def test_every_kernel_is_compiled_for_both_models_and_has_a_budget(kernels):
    for shape in ("80b", "7b"):
        found = {name for name, kernel in named(kernels) if kernel["shape"] == shape}
        assert found == BUDGET.keys()


def test_no_register_is_spilled_inside_a_loop_of_matrix_products_and_hardly_any_elsewhere(kernels):
    assert listed(kernels, over="in_loops", limit=lambda name: IN_LOOPS.get(name, 0)) == []
    assert listed(kernels, over="spilled", limit=lambda name: SPILLED.get(name, 0)) == []


def test_registers_and_shared_memory_stay_within_the_budget(kernels):
    assert listed(kernels, over="registers", limit=BUDGET.__getitem__) == []
    assert listed(kernels, over="shared", limit=lambda name: SHARED_LIMIT) == []


def test_kernels_that_overlap_wait_before_they_touch_memory_and_the_others_do_not_wait(kernels):
    for (operator, name), kernel in named(kernels):
        partitions = PARTITIONS.get(name, 1) if operator == "grouped" else 1
        assert kernel["waits"] == (partitions if operator in OVERLAPPING else 0), (operator, name)


def test_products_of_large_tiles_are_warp_group_instructions(kernels):
    without = {name for name, kernel in named(kernels) if not kernel["wgmma"]}
    assert without & MATRIX_KERNELS.keys() == set()
