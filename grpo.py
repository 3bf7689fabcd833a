"""GRPO: rewards, advantages and loss of group relative policy optimisation, as pure functions.

For one prompt (B of them) the policy samples G answers; each gets a reward, and an answer is good
if it is better than the others of its group: no value network is needed.

    reward      r_i   = w_acc * accuracy_i + w_fmt * format_i            (B, G)     section 4
    advantage   A_i   = (r_i - mean_j r_j) / (std_j r_j + eps)           (B, G)     section 4
    ratio       rho_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)        (B, G, R)
    loss_t            = -min(rho_t A, clip(rho_t, 1 - low, 1 + high) A) + beta KL_t
    loss              = mean over all tokens of all answers of loss_t

                 answers of one prompt, G = 4            same advantage for each token
    rewards      [1.0   0.1   1.0   0.1]   ->  [0.87 -0.87 0.87 -0.87]  ->  x mask (B, G, R)

This file is the METHOD of a run: train.py calls reward(), advantages() and loss() with a Config;
`train.py --method FILE.py` takes those names from another file first. So a reward of one's own, or
a published variant, is a short file: what it does not define is taken from here.

What the large systems do: the same, spread over a worker class, a reward manager and a core file;
log-probs of the old policy come from an extra pass over all sequences. What differs here:
    - on-policy shortcut: in the first update after sampling, pi_old IS the current policy, so
      old_logp = logp.detach(); no pass is spent on it (old_logp=None).
    - groups whose rewards are all equal have advantage 0: they train nothing, unless there is a KL
      term. informative() finds them, and the caller leaves them out of the packs (it counts them).
    - the mean is over the GLOBAL number of tokens (or sequences), given by the caller: the loss
      does not change with ranks, micro-batches or padding.

Differences from the public code:
    DEVIATION 1: an answer with several <answer> spans is wrong (there the first or last one counts,
        so that naming all letters can pay).
    DEVIATION 2: the format has each of its four tags once (there a second answer may stand within).

Glossary: B prompts, G answers a prompt, R tokens of the longest answer; logp log-probabilities of
the sampled tokens, mask 1.0 at real tokens. Copied alone it needs torch, nothing else.
Check this file alone:  pytest tests/test_grpo.py
"""

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """The GRPO stage; defaults are the released ones of Long-RL where they are stated."""

    steps: int = 100  # rollout batches
    prompts: int = 512  # prompts of a rollout batch, over all ranks
    update_prompts: int = 128  # prompts of one optimizer step; fewer than prompts: off-policy
    micro_prompts: int = 1  # prompts in one forward pass of a rank
    group: int = 8  # G, answers to each prompt
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained
    top_p: float = 0.99  # nucleus of sampling
    top_k: int = 0  # sample from the k most likely tokens; 0: from all
    accuracy_weight: float = 0.9  # reward of a right answer
    format_weight: float = 0.1  # reward of the right format
    scale_std: bool = True  # divide advantages by the group's standard deviation
    clip_low: float = 0.2  # the ratio is clipped from below at 1 - clip_low
    clip_high: float = 0.3  # and from above at 1 + clip_high
    dual_clip: float = 3.0  # for negative advantages, -ratio * A is at most dual_clip * |A|
    kl_coef: float = 1e-2  # weight of the KL term; 0 skips the reference model altogether
    tis_cap: float = 0.0  # truncated importance sampling: largest weight of a token; 0: no weights
    average: Literal["token", "sequence"] = "token"  # mean over tokens, or over answers' means
    lr: float = 1e-6  # AdamW, constant
    weight_decay: float = 1e-2  # decoupled weight decay
    grad_clip: float = 1.0  # largest norm of the gradient; 0: it is not clipped
    mean_mismatch: float = 0.1  # stop if log-probs of sampler and trainer differ by more on average
    max_mismatch: float = 20.0  # stop if those of a single token differ by more
    lora_rank: int = 0  # rank of adapters (LoRA) trained in place of the decoder's weights; 0: none
    lora_alpha: float = 32.0  # what adapters add to a layer is scaled by lora_alpha / lora_rank

    def __post_init__(self):
        least = {"steps": 1, "prompts": 1, "update_prompts": 1, "micro_prompts": 1, "group": 2}
        least |= dict.fromkeys("top_k tis_cap kl_coef lora_rank weight_decay grad_clip".split(), 0)
        for name, smallest in least.items():
            value = getattr(self, name)
            if not value >= smallest:  # nan fails too
                raise ValueError(f"{name} must be at least {smallest}, not {value}")
        for name in "temperature lr mean_mismatch max_mismatch lora_alpha".split():
            value = getattr(self, name)
            if not value > 0:
                raise ValueError(f"{name} must be above 0, not {value}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not self.dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, not {self.dual_clip}")
        if self.average not in ("token", "sequence"):
            raise ValueError(f"average must be token or sequence, not {self.average!r}")


# -------------------------------------------------------------------------------------- rewards


def format_reward(completion: str) -> float:
    """1.0 if the WHOLE completion is <think>...</think> <answer>...</answer>, else 0.0.

    >>> format_reward("<think> a red car </think> <answer> B </answer>")
    1.0
    >>> format_reward("Sure! <think> a red car </think> <answer> B </answer>")
    0.0
    """
    pattern = r"<think>.*?</think>\s*<answer>.*?</answer>"
    whole = re.fullmatch(pattern, completion.strip(), flags=re.DOTALL) is not None
    once = all(completion.count(f"<{t}") == 1 for t in ("think>", "/think>", "answer>", "/answer>"))
    return float(whole and once)  # DEVIATION 2: .*? alone lets a second answer through


def as_number(text: str) -> float | None:
    """The number that text is, or None: "1,000" -> 1000.0, "3.0" -> 3.0, "three" -> None."""
    form = r"[-+]?(\d{1,3}(,\d{3})+|\d+)?(\.\d+)?"
    is_number = re.fullmatch(form, text) and re.search(r"\d", text)
    return float(text.replace(",", "")) if is_number else None


def same_text(a: str, b: str) -> bool:
    """Equal as numbers if both are numbers, else up to case, spacing and a "." at the end."""
    a, b = (text.strip().removesuffix(".") for text in (a, b))
    x, y = as_number(a), as_number(b)
    if x is not None and y is not None:
        return x == y
    return a.lower().split() == b.lower().split()


def chosen_letter(answer: str, options: tuple[str, ...]) -> str | None:
    """The letter that an answer names: "B", "B.", "B)", "(B)", "B. red", or "red" if that is
    exactly one option's text. None for anything else.

    >>> [chosen_letter(a, ("blue", "red")) for a in ("B", "(B)", "B. red", "red", "B. blue", "b")]
    ['B', 'B', 'B', 'B', None, None]
    """
    letters = [chr(ord("A") + i) for i in range(len(options))]
    bare = re.fullmatch(r"\(([A-Z])\)|([A-Z])[.)]?", answer)
    if bare and (bare[1] or bare[2]) in letters:
        return bare[1] or bare[2]
    full = re.fullmatch(r"(?:\(([A-Z])\)|([A-Z])[.):])\s*(.+)", answer, flags=re.DOTALL)
    if full and (full[1] or full[2]) in letters:
        letter = full[1] or full[2]
        if same_text(full[3], options[letters.index(letter)]):
            return letter
    named = [x for x, text in zip(letters, options) if text and same_text(answer, text)]
    return named[0] if len(named) == 1 else None


def accuracy_reward(completion: str, gold: str, options: tuple[str, ...] = ()) -> float:
    """1.0 if the one <answer> span of the completion gives the gold answer, else 0.0.

    With options, gold is a letter; without, gold is text or a number ("3" equals "3.0").

    >>> accuracy_reward("<think> . </think> <answer> B. </answer>", "B", ("blue", "red"))
    1.0
    >>> accuracy_reward("<answer> A </answer> <answer> B </answer>", "B", ("blue", "red"))
    0.0
    """
    spans = re.findall(r"<answer>(.*?)</answer>", completion, flags=re.DOTALL)
    if len(spans) != 1 or completion.count("<answer>") != 1:  # DEVIATION 1
        return 0.0
    answer = spans[0].strip()
    if options:
        return float(chosen_letter(answer, options) == gold)
    return float(bool(answer) and same_text(answer, gold))


def graded(completion: str, thinking: bool) -> str:
    """What is graded: in non-thinking mode a bare completion is the answer itself.

    >>> graded("B", thinking=False), graded("B", thinking=True)
    ('<think></think> <answer>B</answer>', 'B')
    """
    if thinking or "<answer>" in completion:
        return completion
    return f"<think></think> <answer>{completion}</answer>"


def reward(completion: str, example, config: Config) -> dict[str, float]:
    """The reward of one answer and its parts, 0.9 accuracy + 0.1 format (section 4).

    example: the question (data.Example); here its answer and its options count. The parts are
    logged and shown; "reward" is trained on, "accuracy" (0 to 1) is what evaluation reports.

    >>> from types import SimpleNamespace
    >>> example = SimpleNamespace(answer="B", options=("blue", "red"))
    >>> reward("<think> . </think> <answer> A </answer>", example, Config())
    {'reward': 0.1, 'accuracy': 0.0, 'format': 1.0}
    """
    right = accuracy_reward(completion, example.answer, example.options)
    form = format_reward(completion)
    total = config.accuracy_weight * right + config.format_weight * form
    return {"reward": total, "accuracy": right, "format": form}


# ----------------------------------------------------------------------------------- advantages


def advantages(rewards: Tensor, config: Config, eps: float = 1e-6) -> Tensor:
    """Group relative advantages: rewards (B, G) -> (B, G); sums to 0 in each group.

    Divided by the unbiased standard deviation, as the paper does, unless config.scale_std is False
    (Dr. GRPO, arXiv 2503.20783: dividing gives easy and hard questions more weight).

    >>> advantages(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), Config())
    tensor([[ 0.8660, -0.8660,  0.8660, -0.8660]])
    """
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (B, G) with G >= 2, got {tuple(rewards.shape)}")
    wide = rewards.double()  # in float32 the rounding of eight times 0.1 is not small beside eps
    out = wide - wide.mean(dim=1, keepdim=True)
    if config.scale_std:
        out = out / (wide.std(dim=1, keepdim=True) + eps)
    return out.to(rewards.dtype)


def informative(advantage: Tensor, eps: float = 1e-6) -> Tensor:
    """(B, G) -> (B,) bool: groups in which some answer has an advantage. The others teach nothing:
    all of their answers earned the same."""
    return advantage.abs().amax(dim=1) > eps


# ----------------------------------------------------------------------------------------- loss


def kl_k3(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Per-token estimate of KL(pi || pi_ref) from samples of pi: unbiased and never negative
    (estimator k3, http://joschu.net/blog/kl-approx.html). Any shape.

        k3 = pi_ref / pi - log(pi_ref / pi) - 1
    """
    log_ratio = (ref_logp - logp).clamp(-20, 20)  # exp(20) is large enough, and finite
    return log_ratio.exp() - log_ratio - 1


def policy_loss(ratio: Tensor, advantage: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Clipped surrogate per token, and where a clip is in force. Shapes broadcast to (B, G, R).

    With A > 0 the loss is -min(ratio, 1 + high) A: no reward for going further up. With A < 0 it
    is -max(ratio, 1 - low) A, and (dual clip, arXiv 1912.09729) never more than dual_clip |A|, or
    one token that became likely by other updates would drown the batch.
    """
    plain = -advantage * ratio
    clipped = -advantage * ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
    surrogate = torch.maximum(plain, clipped)
    bound = -advantage * config.dual_clip
    dual = torch.where(advantage < 0, torch.minimum(surrogate, bound), surrogate)
    return dual, (clipped > plain) | (dual < surrogate)


def average(
    per_token: Tensor, mask: Tensor, config: Config, total_tokens=None, total_sequences=None
) -> Tensor:
    """The mean of per_token (B, G, R) under the mask, a scalar: over all tokens, or over the means
    of all sequences (config.average). total_tokens, total_sequences: as in loss()."""
    per_token = per_token * mask
    if config.average == "token":
        count = mask.sum() if total_tokens is None else total_tokens
        return per_token.sum() / max(count, 1)
    length = mask.sum(-1)  # (B, G); a row of padding has length 0 and is no sequence
    means = per_token.sum(-1) / length.clamp(min=1)
    count = (length > 0).sum() if total_sequences is None else total_sequences
    return means.sum() / max(count, 1)


def loss(
    logp: Tensor,
    advantage: Tensor,
    mask: Tensor,
    config: Config,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    sampler_logp: Tensor | None = None,
    total_tokens: float | None = None,
    total_sequences: float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The GRPO loss of a (part of a) batch.

    logp, old_logp, ref_logp, sampler_logp, mask (B, G, R); advantage (B, G). old_logp=None:
    on-policy. sampler_logp: what the rollout engine says of its own tokens; with tis_cap it
    corrects for what that engine and the trainer compute differently (kernels, precision):

        weight_t = min(pi_old(y_t) / pi_sampler(y_t), tis_cap)      no gradient; policy term only

    (truncated importance sampling: Yao et al., "Your Efficient RL Framework Secretly Brings You
    Off-Policy RL Training", 2025.)
    total_tokens, total_sequences: of the whole global batch, if this is a part of it; the parts'
    losses and gradients then add up to the whole's.

    Returns the loss (scalar) and what to log of each token, (B, G, R) each, to be averaged under
    the mask: clip_fraction (1.0 where a clip cut the gradient off), kl, ratio_error (|ratio - 1|),
    tis_weight.
    """
    if logp.shape != mask.shape or advantage.shape != logp.shape[:2]:
        raise ValueError(
            f"logp {tuple(logp.shape)}, mask {tuple(mask.shape)} must be (B, G, R) and advantage "
            f"{tuple(advantage.shape)} (B, G)"
        )
    if config.kl_coef and ref_logp is None:
        raise ValueError("kl_coef is not zero: give ref_logp")
    if config.tis_cap and sampler_logp is None:
        raise ValueError("tis_cap is not zero: give sampler_logp")
    padding = mask == 0
    old_logp = logp.detach() if old_logp is None else old_logp
    # Padding is replaced before exp(): inf * 0 would be nan, in the gradient too.
    log_ratio = (logp - old_logp).masked_fill(padding, 0.0)
    # A clipped token has slope 0, times the ratio: that must be finite (exp(20) is large enough).
    ratio = log_ratio.clamp(-20, 20).exp()
    per_token, clipped = policy_loss(ratio, advantage[..., None], config)  # (B, G, R) each
    tis = torch.ones_like(logp)
    if config.tis_cap:
        gap = (old_logp - sampler_logp).masked_fill(padding, 0.0)
        tis = gap.exp().clamp(max=config.tis_cap).detach()
        per_token = per_token * tis
    kl = torch.zeros_like(logp)
    if config.kl_coef:
        kl = kl_k3(logp.masked_fill(padding, 0.0), ref_logp.masked_fill(padding, 0.0))
        per_token = per_token + config.kl_coef * kl
    seen = {
        "clip_fraction": clipped.to(logp.dtype),
        "kl": kl.detach(),
        "ratio_error": (ratio.detach() - 1).abs(),
        "tis_weight": tis,
    }
    return average(per_token, mask, config, total_tokens, total_sequences), seen
