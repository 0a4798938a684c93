"""Cross-entropy with a split vocabulary, against PyTorch's own on the whole."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing import assert_close

from kernels.cross_entropy import vocab_parallel_cross_entropy
from kernels.errors import KernelError
from tests.conftest import run_processes

S, B, VOCABULARY = 5, 2, 24


def example():
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(S, B, VOCABULARY, generator=generator)  # exponentials overflow without the maximum
    return logits, torch.randint(VOCABULARY, (S, B), generator=generator), torch.randn(S, B, generator=generator)


def labels_out_of_range():
    os.environ["HYSPARSE_DEBUG"] = "1"
    dist.init_process_group("gloo")
    logits, labels, _ = example()
    part = logits.chunk(2, dim=-1)[dist.get_rank()]
    messages = []
    for label in (-1, VOCABULARY):
        labels[3, 1] = label
        with pytest.raises(KernelError) as error:
            vocab_parallel_cross_entropy(part, labels, dist.group.WORLD)
        messages.append(str(error.value))
    return messages


def test_a_label_outside_of_the_vocabulary_is_named_when_debugging():
    for messages in run_processes(labels_out_of_range, 2):
        for label, message in zip((-1, VOCABULARY), messages, strict=True):
            assert message == f"labels[3, 1] is {label}; the vocabulary has {VOCABULARY} words from 0"


def on_one_rank(ranks: int):
    dist.init_process_group("gloo")
    logits, labels, grad = example()
    part = logits.chunk(ranks, dim=-1)[dist.get_rank()].contiguous().requires_grad_()
    loss = vocab_parallel_cross_entropy(part * 1, labels, dist.group.WORLD)
    loss.backward(grad)
    return loss.detach().numpy(), part.grad.numpy()


@pytest.mark.parametrize("ranks", [1, 2])
def test_loss_and_gradient_are_pytorchs(ranks):
    logits, labels, grad = example()
    logits.requires_grad_()
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(S, B)
    expected.backward(grad)
    found = run_processes(on_one_rank, ranks, ranks)
    for loss, _ in found:
        assert_close(torch.from_numpy(loss), expected.detach(), rtol=1e-6, atol=1e-5)  # FP32, logits up to 100
    found_grad = torch.cat([torch.from_numpy(part) for _, part in found], dim=-1)
    assert_close(found_grad, logits.grad, rtol=1e-5, atol=1e-6)
