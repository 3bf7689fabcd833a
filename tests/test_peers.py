"""Packages that others use for the same: same numbers. Skipped where a package is not installed.

pip install --no-deps prefix-grouper yunchang
"""

import pytest
import torch
import torch.distributed as dist
from conftest import run_ranks
from test_mrsp import assert_same_grads, random_grads
from test_sp import make_batch, make_policy
from transformers import AttentionInterface

import mrsp


def test_packed_logprobs_and_gradients_equal_those_of_prefix_grouper():
    """The package PrefixGrouper computes a shared prompt once too; by two attentions, of the prompt
    by itself and of all answers behind copies of its keys and values."""
    peer = pytest.importorskip("prefix_grouper")

    def attention(q, k, v, real):  # q (b, H, Lq, D), real (b, Lk) -> (b, Lq, H, D)
        at = torch.arange(k.shape[2]) - (k.shape[2] - q.shape[2])  # of the keys; queries from 0 on
        mask = at <= torch.arange(q.shape[2])[:, None]
        mask = mask & real[:, None, None] | (at[None] == torch.arange(q.shape[2])[:, None])
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, enable_gqa=True
        )
        return out.transpose(1, 2)

    def grouped(module, query, key, value, attention_mask, mrsp=None, grouper=None, **_):
        return grouper.forward(attention, query, key, value), None

    policy = make_policy(4, 2)
    lengths = [(37, [5, 1, 3]), (9, [4, 2]), (26, [2, 7, 2, 1])]
    pack = make_batch([(p, answers, 0) for p, answers in lengths])
    logp, _ = policy(mrsp.shard(pack, mrsp.Mesh()))
    grads = random_grads(policy, logp)

    AttentionInterface.register("prefix_grouper", grouped)
    policy.model.set_attn_implementation("prefix_grouper")
    grouper = peer.PrefixGrouper([[p, *answers] for p, answers in lengths])
    hidden = policy.model(  # its grouped sequence is laid out as our packed one
        input_ids=pack.ids, position_ids=pack.positions, use_cache=False, grouper=grouper
    ).last_hidden_state
    logits = policy.lm_head(hidden.flatten(0, 1)[pack.hidden_at])
    theirs = logits.log_softmax(-1).gather(-1, pack.targets[:, None])[:, 0]
    assert (logp - theirs).abs().max() < 1e-9
    assert_same_grads(grads, random_grads(policy, theirs), 1e-9)


def _exchange_rank(rank):
    from yunchang.comm.all_to_all import SeqAllToAll4D

    group, g = dist.group.WORLD, torch.Generator().manual_seed(rank)
    q, k = (torch.randn(3, h, 5, 4, generator=g, dtype=torch.float64) for h in (8, 4))
    q.requires_grad_()  # (B, H, Ls, D)
    k.requires_grad_()
    ups = []
    for x, ours in zip((q, k), mrsp.tokens_for_heads([q, k], group), strict=True):
        # theirs is (B, L, H, D); both have my heads of all tokens, ranks in order
        theirs = SeqAllToAll4D.apply(group, x.transpose(1, 2), 2, 1).transpose(1, 2)
        assert torch.equal(ours, theirs) and ours.shape[2] == 5 * dist.get_world_size()
        ups.append(torch.randn(ours.shape, generator=g, dtype=torch.float64))
        a, b = (torch.autograd.grad(y, x, ups[-1], retain_graph=True)[0] for y in (ours, theirs))
        assert torch.equal(a, b)
        ours, theirs = ours.detach().requires_grad_(), theirs.detach().requires_grad_()
        back = mrsp.heads_for_tokens(ours, group)
        again = SeqAllToAll4D.apply(group, theirs.transpose(1, 2), 1, 2).transpose(1, 2)
        assert torch.equal(back, again) and torch.equal(back, x)
        up = torch.randn(back.shape, generator=g, dtype=torch.float64)
        (a,), (b,) = torch.autograd.grad(back, ours, up), torch.autograd.grad(again, theirs, up)
        assert torch.equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_the_exchange_of_tokens_for_heads_equals_that_of_yunchang(world):
    """Both ways and both gradients, for different numbers of heads, over gloo."""
    pytest.importorskip("yunchang")
    run_ranks(_exchange_rank, world)
