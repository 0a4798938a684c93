"""The plain mixture of experts against a loop over tokens, and what its bias and its balance loss are for."""

import math

import pytest
import torch
from torch.testing import assert_close

from hysparse.choices import RouterScore
from hysparse.config import MoEConfig
from hysparse.plain import MoE, sequence_balance_loss


@pytest.mark.parametrize("active", [1, 2])
@pytest.mark.parametrize("score", list(RouterScore))
def test_routing_equals_a_loop_over_tokens(score, active):
    torch.manual_seed(4)
    config = MoEConfig(experts=5, active=active, ffn=12, score=score, bias_update_rate=0, aux_loss=0.5, z_loss=0.25)
    moe, x = MoE(16, config).double(), torch.randn(2, 7, 16, dtype=torch.float64)
    moe.requires_grad_(False).expert_bias.copy_(torch.tensor([0.0, 0.4, 0.0, -0.4, 0.0]))
    y, auxiliary = moe(x)

    balance, z = 0.0, 0.0
    for b in range(2):
        count, mean_score = [0] * 5, [0.0] * 5
        for t in range(7):
            logits = [float(moe.router.weight[e] @ x[b, t]) for e in range(5)]
            total = sum(math.exp(logit) for logit in logits)
            z += math.log(total) ** 2 / 14
            if score == RouterScore.sigmoid:
                scores = [1 / (1 + math.exp(-logit)) for logit in logits]
                biased = [s + float(bias) for s, bias in zip(scores, moe.expert_bias, strict=True)]
            else:
                scores = biased = [math.exp(logit) / total for logit in logits]
            chosen = sorted(range(5), key=lambda e, by=biased: -by[e])[:active]
            total = sum(scores[e] for e in chosen)
            if active == 1 and score == RouterScore.sigmoid:  # Megatron does not normalise a lone score
                total = 1
            assert_close(y[b, t], sum(scores[e] / total * moe.experts[e](x[b, t]) for e in chosen))
            for e in sorted(range(5), key=lambda e, by=scores: -by[e])[:active]:
                count[e] += 1
            for e in range(5):
                mean_score[e] += scores[e] / sum(scores) / 7
        balance += sum(5 * count[e] / (active * 7) * mean_score[e] for e in range(5)) / 2
    assert_close(float(auxiliary), 0.5 * balance + 0.25 * z)


def test_the_expert_bias_moves_the_choice_but_not_the_weights():
    torch.manual_seed(5)
    moe, x = MoE(16, MoEConfig(experts=4, active=2, ffn=12)).double(), torch.randn(1, 9, 16, dtype=torch.float64)
    before, loss = moe(x)
    moe.expert_bias += 7.0  # the same for all: the choice stays, and so must everything else
    assert_close(moe(x), (before, loss), rtol=0, atol=0)
    moe.expert_bias[3] += 7.0
    moved, same_loss = moe(x)
    assert not torch.equal(moved, before) and torch.equal(same_loss, loss)


def test_the_balance_loss_of_a_balanced_router_is_one():
    scores = torch.eye(4).repeat(1, 2, 1) * 0.4 + 0.15  # each expert is the best of two tokens in eight
    assert_close(sequence_balance_loss(scores, 1), torch.tensor(1.0))
    assert sequence_balance_loss(scores[:, :1], 1) > 2
