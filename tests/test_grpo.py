"""Properties of grpo.py: rewards, advantages, and the loss with its gradients.

The loss is checked against `plain_loss`, a loop over single tokens in Python floats that is
written by cases and shares no code with grpo.py; gradients against its central differences.
"""

import math
from dataclasses import replace

import pytest
import torch
from conftest import says

from eval import lenient_accuracy
from grpo import (
    Config,
    accuracy_reward,
    advantages,
    chosen_letter,
    format_reward,
    informative,
    kl_k3,
    loss,
    policy_loss,
)

# Below, inside and above both sides of the clip (0.8, 1.3) and of the dual clip (3). 0.75 and 1.25
# tell the two sides apart. None lies on a kink, where a finite difference means nothing.
RATIOS = (1.0, 0.1, 3.1, 0.75, 1.25, 1.31, 0.79, 20.0, 0.81, 2.9)
LENGTHS = ((10, 10, 1, 7), (10, 3, 0, 5), (2, 10, 9, 1))  # one answer is padding only
ADVANTAGES = ((1.3, -0.7, 0.4, -1.0), (0.0, 0.0, 0.0, 0.0), (-1.1, 0.9, -0.5, 0.3))  # 1: all equal


def batch(on_policy=False):
    """logp, old (None on-policy), ref, mask (3, 4, 10) and advantage (3, 4), all float64."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 4, len(RATIOS))
    logp = -0.05 - 3 * torch.rand(shape, generator=generator, dtype=torch.float64)
    ref = logp + 0.7 * torch.randn(shape, generator=generator, dtype=torch.float64)
    old = logp - torch.tensor(RATIOS, dtype=torch.float64).log()
    mask = torch.arange(shape[2]) < torch.tensor(LENGTHS)[..., None]
    advantage = torch.tensor(ADVANTAGES, dtype=torch.float64)
    return logp, None if on_policy else old, ref, mask.double(), advantage


def plain_loss(
    logp, old, ref, said, mask, advantage, config, total_tokens=None, total_sequences=None
):
    """The loss and the five sums, token by token, from lists; said: the sampler's log-probs. None
    of them may be None."""
    losses, sums = [], {"tokens": 0.0, "clipped": 0.0, "kl": 0.0, "ratio_error": 0.0, "tis": 0.0}
    for b in range(len(logp)):
        for g in range(len(logp[b])):
            tokens, a = [], advantage[b][g]
            for t in range(len(logp[b][g])):
                if not mask[b][g][t]:
                    continue
                rho = math.exp(logp[b][g][t] - old[b][g][t])
                if a > 0:  # nothing to gain above 1 + high
                    objective, cut = min(rho, 1 + config.clip_high) * a, rho > 1 + config.clip_high
                elif a < 0:  # nothing to gain below 1 - low, nothing to lose above the dual clip
                    objective = min(max(rho, 1 - config.clip_low), config.dual_clip) * a
                    cut = not 1 - config.clip_low <= rho <= config.dual_clip
                else:
                    objective, cut = 0.0, False
                kl = 0.0
                if config.kl_coef:
                    log_ratio = ref[b][g][t] - logp[b][g][t]
                    kl = math.exp(log_ratio) - log_ratio - 1
                weight = 1.0
                if config.tis_cap:
                    weight = min(math.exp(old[b][g][t] - said[b][g][t]), config.tis_cap)
                tokens.append(-objective * weight + config.kl_coef * kl)
                sums["tokens"] += 1
                sums["clipped"] += cut
                sums["kl"] += kl
                sums["ratio_error"] += abs(rho - 1)
                sums["tis"] += weight
            losses.append(tokens)
    answers = [tokens for tokens in losses if tokens]
    if config.average == "token":
        count = total_tokens or sum(len(tokens) for tokens in answers)
        return sum(sum(tokens) for tokens in answers) / count, sums
    count = total_sequences or len(answers)
    return sum(sum(tokens) / len(tokens) for tokens in answers) / count, sums


def loss_and_sums(logp, advantage, mask, config, *others, **totals):
    """grpo.loss, and the sums of what it says of each token."""
    value, seen = loss(logp, advantage, mask, config, *others, **totals)
    names = {"clip_fraction": "clipped", "tis_weight": "tis"}
    sums = {names.get(name, name): (x * mask).sum() for name, x in seen.items()}
    return value, {"tokens": mask.sum()} | sums


def loss_and_gradient(logp, old, ref, mask, advantage, config, **totals):
    logp = logp.clone().requires_grad_()
    value, sums = loss_and_sums(logp, advantage, mask, config, old, ref, **totals)
    return value.detach(), torch.autograd.grad(value, logp)[0], sums


CONFIGS = [Config(kl_coef=kl, average=a) for kl in (0.0, 0.05) for a in ("token", "sequence")]
each_config = pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.average}-{c.kl_coef}")
each_policy = pytest.mark.parametrize("on_policy", (False, True), ids=("off", "on"))


# ----------------------------------------------------------------------------------------- loss


TOTALS = {"total_tokens": 131.0, "total_sequences": 17.0}


@each_config
@each_policy
@pytest.mark.parametrize("cap, totals", ((0.0, {}), (0.0, TOTALS), (0.7, {}), (2.0, {})))
def test_loss_and_gradients_equal_a_scalar_loop(config, on_policy, cap, totals):
    """cap: of the weight min(pi_old / pi_sampler, cap) on each token's policy term, which is on
    both sides of it, has no gradient, and is 1 without a cap whatever the sampler said."""
    logp, old, ref, mask, advantage = batch(on_policy)
    start = logp if old is None else old
    gap = torch.linspace(-1.5, 1.5, logp.numel(), dtype=torch.float64).view_as(logp).roll(7)
    config = replace(config, tis_cap=cap)
    lists = [x.tolist() for x in (logp, start, ref, start - gap, mask, advantage)]
    said = (start - gap).masked_fill(mask == 0, math.nan).requires_grad_()
    logp.requires_grad_()
    loss, sums = loss_and_sums(logp, advantage, mask, config, old, ref, said, **totals)
    gradient, none = torch.autograd.grad(loss, (logp, said), allow_unused=True)
    assert none is None

    expected, expected_sums = plain_loss(*lists, config, **totals)
    assert abs(loss.item() - expected) < 1e-12
    assert sums.keys() == expected_sums.keys()
    for name, value in expected_sums.items():
        assert abs(sums[name].item() - value) < 1e-10, name

    h, point = 1e-5, lists[0]  # central differences of the loop; pi_old stays where it is
    for b, g, t in torch.cartesian_prod(*map(torch.arange, logp.shape)).tolist():
        at = point[b][g][t]
        point[b][g][t] = at + h
        above = plain_loss(*lists, config, **totals)[0]
        point[b][g][t] = at - h
        below = plain_loss(*lists, config, **totals)[0]
        point[b][g][t] = at
        slope = (above - below) / (2 * h)
        assert gradient[b, g, t].item() == pytest.approx(slope, rel=1e-6, abs=1e-10), (b, g, t)


def test_on_policy_gradient_is_minus_the_advantage_a_token():
    logp, _, _, mask, advantage = batch()
    _, gradient, _ = loss_and_gradient(logp, None, None, mask, advantage, Config(kl_coef=0))
    expected = -advantage[..., None] * mask / sum(map(sum, LENGTHS))
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    "advantage, ratio, loss, slope, cut",
    [  # slope is d loss / d ratio; clip 0.8 .. 1.3, dual clip 3
        (2.0, 0.5, -1.0, -2.0, False),
        (2.0, 1.29, -2.58, -2.0, False),
        (2.0, 1.5, -2.6, 0.0, True),
        (2.0, 50.0, -2.6, 0.0, True),
        (-2.0, 0.5, 1.6, 0.0, True),
        (-2.0, 0.81, 1.62, 2.0, False),
        (-2.0, 1.5, 3.0, 2.0, False),
        (-2.0, 2.9, 5.8, 2.0, False),
        (-2.0, 50.0, 6.0, 0.0, True),
        (0.0, 50.0, 0.0, 0.0, False),
    ],
)
def test_clips_cut_where_there_is_nothing_to_gain(advantage, ratio, loss, slope, cut):
    rho = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    value, clipped = policy_loss(rho, torch.tensor([advantage], dtype=torch.float64), Config())
    assert value.item() == pytest.approx(loss, abs=1e-12)
    assert torch.autograd.grad(value.sum(), rho)[0].item() == pytest.approx(slope, abs=1e-12)
    assert clipped.item() is cut


@pytest.mark.parametrize("average", ("token", "sequence"))
def test_zero_variance_groups_train_nothing(average):
    logp, old, ref, mask, _ = batch()
    rewards = torch.tensor([[1.0, 0.0, 1.0, 0.1], [1.1] * 4, [0.0] * 4], dtype=torch.float64)
    config = Config(kl_coef=0, average=average)
    _, gradient, _ = loss_and_gradient(logp, old, ref, mask, advantages(rewards, Config()), config)
    assert torch.count_nonzero(gradient[1:]) == 0 and gradient[0].abs().max() > 0

    # Leaving them out, with the totals of the whole batch, changes nothing.
    totals = {"total_tokens": mask.sum().item(), "total_sequences": 11.0}
    kept = [x[:1] for x in (logp, old, ref, mask, advantages(rewards, Config()))]
    _, alone, _ = loss_and_gradient(*kept, config, **totals)
    torch.testing.assert_close(alone, gradient[:1], rtol=0, atol=1e-15)


@each_config
@each_policy
@pytest.mark.parametrize("garbage", (0.0, -math.inf, math.inf, math.nan, 1e9, -1e9))
def test_padding_and_what_it_holds_change_nothing(config, on_policy, garbage):
    logp, old, ref, mask, advantage = batch(on_policy)
    loss, gradient, sums = loss_and_gradient(logp, old, ref, mask, advantage, config)

    def spoil(x):  # fill the padding with garbage, and add 3 more columns of it
        wide = torch.full((*x.shape[:2], x.shape[2] + 3), garbage, dtype=x.dtype)
        wide[..., : x.shape[2]] = torch.where(mask > 0, x, garbage)
        return wide

    logp, old, ref = (None if x is None else spoil(x) for x in (logp, old, ref))
    mask = torch.nn.functional.pad(mask, (0, 3))
    loss2, gradient2, sums2 = loss_and_gradient(logp, old, ref, mask, advantage, config)
    torch.testing.assert_close(loss2, loss, rtol=0, atol=1e-14)
    torch.testing.assert_close(gradient2[..., :-3], gradient, rtol=0, atol=1e-14)
    assert torch.count_nonzero(gradient2[mask == 0]) == 0
    for name, value in sums.items():
        torch.testing.assert_close(sums2[name], value, rtol=0, atol=1e-11)


@each_config
@pytest.mark.parametrize("cuts", ((1, 2), (2, 1), (1, 1, 1)))
def test_parts_with_global_totals_add_up_to_the_whole(config, cuts):
    tensors = batch()
    loss, gradient, sums = loss_and_gradient(*tensors, config)
    totals = {"total_tokens": tensors[3].sum().item(), "total_sequences": 11.0}
    parts = zip(*(x.split(cuts) for x in tensors), strict=True)
    pieces = [loss_and_gradient(*part, config, **totals) for part in parts]
    torch.testing.assert_close(sum(p[0] for p in pieces), loss, rtol=0, atol=1e-13)
    torch.testing.assert_close(torch.cat([p[1] for p in pieces]), gradient, rtol=0, atol=1e-14)
    for name in sums:
        torch.testing.assert_close(sum(p[2][name] for p in pieces), sums[name], rtol=0, atol=1e-11)


def test_averages_weigh_a_long_answer_differently():
    logp = torch.zeros(1, 2, 4, dtype=torch.float64)
    mask = torch.tensor([[[1.0, 1, 1, 1], [1, 0, 0, 0]]], dtype=torch.float64)
    advantage = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    config = Config(kl_coef=0)
    assert loss_and_sums(logp, advantage, mask, config)[0].item() == pytest.approx(-3 / 5)
    config = replace(config, average="sequence")
    assert loss_and_sums(logp, advantage, mask, config)[0].item() == pytest.approx(0)


def test_wrong_use_is_an_error():
    logp, old, ref, mask, advantage = batch()
    for message, given, settings in (
        ("tis_cap is not zero: give sampler_logp", (advantage, mask, old, ref), {"tis_cap": 2.0}),
        ("kl_coef", (advantage, mask), {}),
        ("average", (advantage, mask, old, ref), {"average": "group"}),
        ("mask", (advantage, mask[..., 1:], old, ref), {}),
        ("advantage", (advantage[:, :1], mask, old, ref), {}),
    ):
        with pytest.raises(ValueError, match=message):
            loss_and_sums(logp, *given[:2], Config(**settings), *given[2:])


@pytest.mark.parametrize("advantage", (1.0, -1.0))
def test_a_clipped_token_has_no_gradient_however_large_its_ratio(advantage):
    logp, old = torch.tensor([[[-1.0]]]), torch.tensor([[[-100.0]]])
    a, mask = torch.tensor([[advantage]]), torch.ones(1, 1, 1)
    _, gradient, _ = loss_and_gradient(logp, old, None, mask, a, Config(kl_coef=0))
    assert gradient.item() == 0


@pytest.mark.parametrize("average", ("token", "sequence"))
def test_a_part_without_tokens_has_loss_zero(average):
    config, zero = Config(kl_coef=0, average=average), torch.zeros(1, 2, 3)
    assert loss_and_sums(zero, torch.zeros(1, 2), zero, config)[0].item() == 0


def test_a_weight_stays_finite_however_far_the_sampler_is():
    logp = torch.tensor([[[-1.0, -200.0]]], requires_grad=True)
    said, a, mask = torch.tensor([[[-200.0, -1.0]]]), torch.tensor([[1.0]]), torch.ones(1, 1, 2)
    loss, sums = loss_and_sums(logp, a, mask, Config(kl_coef=0, tis_cap=5.0), None, None, said)
    gradient = torch.autograd.grad(loss, logp)[0]
    assert gradient[0, 0].tolist() == pytest.approx([-2.5, 0.0], abs=1e-6) and sums["tis"] < 5.01


# ----------------------------------------------------------------------------------- advantages

REWARDS = torch.tensor([[1.1, 0.1, 1.0, 0.0, 1.1], [0.1, 0.1, 0.1, 0.1, 1.1]], dtype=torch.float64)


@pytest.mark.parametrize("scale_std", (True, False))
def test_advantages_are_centred_and_divided_by_the_unbiased_std(scale_std):
    result = advantages(REWARDS, Config(scale_std=scale_std)).tolist()
    for group, values in zip(REWARDS.tolist(), result, strict=True):
        mean = math.fsum(group) / len(group)
        variance = math.fsum((r - mean) ** 2 for r in group) / (len(group) - 1)
        scale = math.sqrt(variance) + 1e-6 if scale_std else 1
        assert values == pytest.approx([(r - mean) / scale for r in group], abs=1e-12)


@pytest.mark.parametrize("scale_std", (True, False))
@pytest.mark.parametrize("group, reward", ((8, 1.1), (8, 0.1), (8, 0.7), (12, 1.1)))
def test_equal_rewards_have_advantage_zero_whatever_rounding_does(group, reward, scale_std):
    found = advantages(torch.full((1, group), reward), Config(scale_std=scale_std))
    assert found.abs().max() < 1e-4  # dividing by a rounded std could give 0.1


@pytest.mark.parametrize("shape", ((3, 1), (3, 0), (4,), (1, 2, 3)))
def test_advantages_need_groups_of_two_or_more(shape):
    with pytest.raises(ValueError, match="must be"):
        advantages(torch.zeros(shape), Config())


@pytest.mark.parametrize("scale_std", (True, False))
def test_informative_groups_are_those_whose_rewards_differ(scale_std):
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.1, 0.1, 0.1], [0.1, 0.1, 0.0], [0.0, 1.0, 0.5]])
    found = informative(advantages(rewards, Config(scale_std=scale_std)))
    assert found.tolist() == [False, False, True, True]


# ------------------------------------------------------------------------------------------- KL


def test_kl_estimate_is_never_negative_and_zero_only_when_equal():
    logp, ref = torch.meshgrid(*[torch.linspace(-9, 0, 91, dtype=torch.float64)] * 2, indexing="ij")
    kl = kl_k3(logp, ref)
    assert kl.min() >= 0
    assert torch.equal(kl == 0, logp == ref)


def test_kl_estimate_is_unbiased():
    p = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
    q = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
    expectation = (p * kl_k3(p.log(), q.log())).sum()  # over answers sampled from the policy p
    torch.testing.assert_close(expectation, (p * (p / q).log()).sum(), rtol=0, atol=1e-14)


# -------------------------------------------------------------------------------------- rewards


def each(table: dict) -> list[tuple]:
    """{what is known: texts, parted by |} as (text, *what is known)."""
    return [(text, *known) for known, texts in table.items() for text in texts.split("|")]


FORMATS = {  # reward: completions, parted by |
    (1,): (
        "<think> a </think> <answer> B </answer>|<think>a</think><answer>B</answer>|"
        "\n<think>\nmany\nlines\n</think>\n\n<answer>\nB\n</answer>\n"
    ),
    (0,): (
        "Sure! <think> a </think> <answer> B </answer>|"
        "<think> a </think> <answer> B </answer> Done.|"
        "<think> a </think> so <answer> B </answer>|<answer> B </answer> <think> a </think>|"
        "<answer> B </answer>|<think> a </think>|<think> a <answer> B </answer>|"
        "<think> a </think> <answer> B|<THINK> a </THINK> <ANSWER> B </ANSWER>|B||"
        "<think> a </think> <answer> A </answer> junk <answer> B </answer>|"
        "<think> a </think> <answer> A </answer> junk </answer>|"
        "<think> a </think> so <think> b </think> <answer> A </answer>|"
        "<think> <answer> A </answer> </think> <answer> B </answer>"
    ),
}


@pytest.mark.parametrize("completion, expected", each(FORMATS))
def test_format_is_one_think_then_one_answer_and_nothing_else(completion, expected):
    assert format_reward(completion) == expected


COLORS = ("blue", "red", "dark green")  # A, B, C
NUMBERS = ("2", "1,000", "4.5")


def test_an_option_whose_text_begins_like_a_letter_can_be_named():
    assert chosen_letter("A. Smith", ("J. Doe", "A. Smith")) == "B"
    assert chosen_letter("X", ("Y", "X")) == "B"


# What is asked for, and what is near it. options, gold, accuracy, lenient accuracy: texts
ANSWERS = {
    (COLORS, "B", 1, 1): "B| \n B \n |B.|B)|(B)|B. red|B) red|(B) red|red|Red.",
    (COLORS, "B", 0, 1): (
        "b|(b)|b. red|B. red or blue|B..|(b) Red|**B**|“B”|B...|B, because A glows red"
    ),
    (COLORS, "B", 0, 0): (
        "A|blue|a|B or C|A B C|B, C|BC|B\nA|B. blue|A. red|not red|re|E|E. red||  |."
    ),
    (COLORS, "A", 0, 0): "A. red",
    (COLORS, "C", 1, 1): "C. dark  green",
    (COLORS, "C", 0, 0): "green|dark",
    (COLORS, "D", 0, 0): "D",
    (COLORS, "E", 0, 0): "E",
    (("red", "red", "blue"), "A", 0, 0): "red",
    (("red", "red", "blue"), "B", 1, 1): "B",
    (NUMBERS, "A", 1, 1): "2.0",
    (NUMBERS, "A", 0, 0): "20",
    (NUMBERS, "B", 1, 1): "1000|1,000|B. 1000",
    (NUMBERS, "B", 0, 0): "1,00",
    (NUMBERS, "C", 1, 1): "4.50",
    (("3", "2"), "B", 1, 1): "2",
    ((), "3.0", 1, 1): "3",
    ((), "1000", 1, 1): "1,000|1,000.0",
    ((), "1,000", 1, 1): "1000.0",
    ((), "-3.00", 1, 1): "-3",
    ((), " 3.", 1, 1): "3.0",
    ((), "0.5", 1, 1): ".5",
    ((), "3", 0, 0): "-3|31|3 4|3 dogs|three|",
    ((), "123", 0, 0): "1,2,3",
    ((), "5 KM/H", 1, 1): "5 km/h.",
    ((), "a red car", 1, 1): "A red   Car",
    ((), "a car", 0, 0): "a red car",
    ((), "", 0, 0): "",
}
COMPLETIONS = {
    (COLORS, "B", 0, 0): (
        "<think> red </think> <answer> </answer> B|"
        "<think> </think> <answer> B </answer> No: <answer> A </answer>|"
        "<think> <answer> A </answer> <answer> B </answer> </think>||"
        "<think> So it is B. </think>|<think> So it is B.|<think> So it is\nB|"
        "B, but A is as good|b, c|Bob, because he waves|The answer is B, and not C.|"
        "The answer is not B.|It is not option B.|B-side|<Answer> B </Answer>|"
        "<answer> B </answer> <answer> A </answer>|"
        "<think> <answer> B </answer> </think> <answer> A </answer>"
    ),
    (COLORS, "B", 0, 1): (
        "<think> </think> <answer> A </answer> No: <answer> B </answer>|"
        "<think> red </think> <answer> B|<think> red </think> B </answer>|"
        "<think> red </think> <answer> <answer> B </answer> </answer>|"
        "<think> <answer> A </answer> </think> <answer> B </answer>|B|(b)|A glows. </think> B|"
        "B\n\nThe second flash is red.|The second flash is red.\n\nB. red|"
        "The second flash is red.\n  b|The answer is B.|The answer is A. No, the answer is B.|"
        "Answer: B. I hope that this answer helps.|**Answer:** the correct option is (B) red|"
        "Option A is wrong, so I take option B.|So it is $\\boxed{\\text{B}}$|"
        "\\boxed{A}, no, \\boxed{B}|B - red|<answer> B|B </answer>|"
        "<answer> A </answer> <answer> B </answer>|<answer> B </answer> <answer> B </answer>|"
        "<answer> <answer> B </answer> </answer>|<answer> A <answer> B </answer>"
    ),
    (COLORS, "B", 1, 1): (
        "<answer> B </answer>|B <think> A </think> <answer> B </answer> C|"
        "<think> <answer> B </answer> </think> A"
    ),
    (COLORS, "C", 0, 1): (
        "dark  GREEN|The answer is the dark green.|C is correct.|"
        "Option B is right, but the answer: C"
    ),
    (COLORS, "A", 0, 0): "A man walks.|The answer is A man who walks.",
    (COLORS, "A", 0, 1): "A, blue|a",
    (COLORS, "D", 0, 0): "D, because it glows",
    (COLORS, "C", 0, 0): "C is wrong.",
    (NUMBERS, "B", 0, 1): "The answer is 1000.",
    (("a dog", "A man"), "B", 0, 1): "A man",
    (("no", "'yes'"), "A", 0, 0): "'no' is what she says",
    (("no", "'yes'"), "B", 0, 1): "The answer is 'yes'",
    ((), "3", 0, 1): (
        "<think> </think> <answer> 4 </answer> <answer> 3 </answer>|3|"
        "There are 4 dogs.\nNo: the answer is **3**.|The answer is 3. I counted the dogs.|"
        "I counted the dogs.\n3.0|The answer is 4. No: the answer is 3."
    ),
    ((), "3", 0, 0): (
        "<think> </think> <answer> 3 </answer> <answer> </answer>|3\nI counted the dogs.|"
        "The answer is 3.5|The answer is 3. No: the answer is 4.|<think> 3 </think>"
    ),
    ((), "It's red", 0, 1): "It’s red",
    ((), "Mr. Smith", 0, 1): "The answer is “Mr. Smith”",
    ((), "B", 0, 0): "The answer is A.",
    ((), "", 0, 0): "",
    ((), ".", 0, 1): ".",
}


@pytest.mark.parametrize(
    "completion, options, gold, strict, lenient",
    each(COMPLETIONS) + [(says(answer), *known) for answer, *known in each(ANSWERS)],
)
def test_strict_and_lenient_grading_and_only_one_answer_span_counts(
    completion, options, gold, strict, lenient
):
    assert accuracy_reward(completion, gold, options) == strict
    assert lenient_accuracy(completion, gold, options) == lenient
