"""Rollout: sample G answers to each prompt, and keep the sampler's log-probs.

The G answers of a prompt grow side by side behind ONE copy of its keys and values. A decode step
feeds the newest token of every answer, (B, G) tokens, as G queries of one row; rule (*) of mrsp.py
says who sees whom, so no cache is ever copied G times:

    cache of a row:   [ prompt, P keys | step 0: r_1 .. r_G | step 1: r_1 .. r_G | ... ]
    queries:            r_1 .. r_G   each sees the prompt and its own column

    prefill (B, P) --> logits of the last prompt token --> G samples     (B, G)
       ^                                                       |
       `---- media features, the same Prompt as in training    v
                                     decode (B, G) -> logits (B, G, V) -> next samples, until all
                                     answers of all prompts have ended

Large systems sample with vLLM; so will this file on GPUs. The engine here is plain PyTorch: it
needs nothing but the policy itself, is in lock-step with it by construction, and is small enough
to copy. Its interface is what every engine has:

    generate(prompts, n, sampling, seeds) -> B lists of n Response
    sync(policy)    take over new weights        (here: shared, or gathered into the own copy)
    sleep(), wake() give back and take memory    (here: nothing is held between calls)

Sampling is by inverse transform: ONE uniform number per token, drawn from a generator seeded per
prompt. So an answer depends on its prompt's seed and not on the batch, rank or order it was
sampled in, and a run repeats.

Differences from common practice:
    DEVIATION 1: the log-prob that is kept is that of the full softmax at the given temperature,
        also under top-p (the trainer computes the same one, so that their ratio starts at 1).
    DEVIATION 2: media tokens are never sampled: a policy could write itself a video.

Glossary: B prompts, G answers each, P longest prompt, V vocabulary, t decode step.
Check this file alone:  pytest tests/test_rollout.py
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, TopPLogitsWarper

from mrsp import Layout, whole


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 2048

    def __post_init__(self):
        if self.temperature < 0 or not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise ValueError(f"need temperature >= 0, 0 < top_p <= 1, max_tokens >= 1: {self}")


@dataclass
class Response:
    """One sampled answer. ids (R,) with the end token if it was reached; logps (R,) float32, of
    the sampler, at its temperature; finished: ended by itself, not cut at max_tokens."""

    ids: Tensor
    logps: Tensor
    text: str
    finished: bool


class TorchEngine:
    """Samples with the policy's own weights; see the opening of this file."""

    def __init__(self, policy, batch_prompts: int = 64, dtype=None):
        """dtype: sample from a copy of the decoder in this precision, made before the policy's
        parameters are sharded. None: from the policy's own weights."""
        if dtype is not None:
            shared = (policy.tower, policy.projector, policy.cache, policy.tokenizer, policy.mesh)
            policy = copy.deepcopy(policy, {id(part): part for part in shared})
            # Not llm.to(dtype): RoPE's frequencies, a buffer, stay float32, as they do under FSDP.
            for p in policy.llm.parameters():
                p.data = p.data.to(dtype)
        self.policy, self.copied, self.batch_prompts = policy, dtype is not None, batch_prompts

    @torch.no_grad()
    def sync(self, policy) -> None:
        if not self.copied:
            if policy.sharded:
                raise ValueError(
                    "give TorchEngine a dtype: sharded weights are sampled from a copy"
                )
            self.policy = policy
            return
        for own, new in zip(self.policy.llm.parameters(), policy.llm.parameters()):
            own.copy_(whole(new))  # gathered one by one: two full copies never exist

    def sleep(self) -> None:
        pass

    def wake(self) -> None:
        pass

    @torch.inference_mode()
    def generate(self, prompts, n: int, sampling: Sampling, seeds=None) -> list[list[Response]]:
        """n answers to each prompt. seeds: one int a prompt (default 0, 1, ...)."""
        if n > 1 and sampling.temperature == 0:
            raise ValueError("greedy sampling gives one answer; use n = 1 or a temperature")
        seeds = list(range(len(prompts))) if seeds is None else list(seeds)
        if len(seeds) != len(prompts):
            raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
        was_training = self.policy.training
        self.policy.eval()
        try:
            out = []
            for i in range(0, len(prompts), self.batch_prompts):
                part = slice(i, i + self.batch_prompts)
                out += self._generate(prompts[part], n, sampling, seeds[part])
            return out
        finally:
            self.policy.train(was_training)

    def _generate(self, prompts, n, sampling, seeds):
        policy, device = self.policy, next(self.policy.parameters()).device
        b, end, total = len(prompts), policy.eos, max(len(p.ids) for p in prompts)
        # Uniform numbers of all decode steps: (B, steps, G), one generator a prompt.
        uniform = torch.stack(
            [
                torch.rand(
                    sampling.max_tokens,
                    n,
                    generator=torch.Generator().manual_seed(seed),
                    dtype=torch.float64,
                )
                for seed in seeds
            ]
        ).to(device)

        # Prefill: prompts right-padded to (B, P); padding has segment -1, which nobody sees.
        ids = torch.zeros(b, total, dtype=torch.long, device=device)
        segment = torch.full((b, total), -1, device=device)
        positions = torch.zeros(*prompts[0].positions.shape[:-1], b, total, dtype=torch.long)
        media, media_at = [], []
        for row, prompt in enumerate(prompts):
            p = len(prompt.ids)
            ids[row, :p], segment[row, :p], positions[..., row, :p] = (
                prompt.ids,
                0,
                prompt.positions,
            )
            if prompt.media is not None:
                media.append(prompt.media)
                media_at.append(prompt.media_at + row * total)
        order = torch.arange(total, device=device).repeat(b, 1)
        x = policy.embed(
            ids,
            torch.cat(media) if media else None,
            torch.cat(media_at).to(device) if media_at else None,
        )
        cache = DynamicCache(config=policy.llm.config)
        body = policy.llm.model
        hidden = body(
            inputs_embeds=x,
            position_ids=positions.to(device),
            past_key_values=cache,
            use_cache=True,
            mrsp=Layout(segment, order, segment, order, [[[(0, 0, len(p.ids))] for p in prompts]]),
        ).last_hidden_state
        length = torch.tensor([len(p.ids) for p in prompts], device=device)
        after = torch.stack([p.positions.max() + 1 for p in prompts]).to(device)  # next position
        last = hidden[torch.arange(b, device=device), length - 1]  # (B, D)
        hidden = last[:, None].expand(-1, n, -1)  # all n answers start from the same state

        columns = torch.arange(1, n + 1, device=device).repeat(b, 1)  # segment of answer g
        alive = torch.ones(b, n, dtype=torch.bool, device=device)
        tokens, logps, lives = [], [], []
        for t in range(sampling.max_tokens):
            token, logp = self._sample(policy.llm.lm_head(hidden), uniform[:, t], sampling)
            tokens.append(token)
            logps.append(logp)
            lives.append(alive)
            alive = alive & (token != end)
            if not alive.any() or t + 1 == sampling.max_tokens:
                break
            q_order = (length + t)[:, None].expand(-1, n)  # (B, G)
            segment, order = torch.cat([segment, columns], 1), torch.cat([order, q_order], 1)
            position = (after + t)[:, None].expand(-1, n)
            if positions.ndim == 3:  # M-RoPE: text has three equal rows
                position = position.expand(3, -1, -1)
            hidden = body(
                inputs_embeds=policy.embed(token, None, None),
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                mrsp=Layout(columns, q_order, segment, order),
            ).last_hidden_state  # (B, G, D)
        tokens, logps, lives = (torch.stack(x, -1).cpu() for x in (tokens, logps, lives))
        done = ~alive.cpu()
        return [
            [
                self._response(tokens[i, g], logps[i, g], int(lives[i, g].sum()), bool(done[i, g]))
                for g in range(n)
            ]
            for i in range(b)
        ]

    def _sample(self, logits: Tensor, uniform: Tensor, sampling: Sampling):
        """logits (B, G, V), uniform (B, G) in [0, 1) -> tokens and their log-probs (B, G)."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(wide) / (sampling.temperature or 1.0)
        logp = logits.log_softmax(-1)
        allowed = logits.clone()  # DEVIATION 2: no media tokens
        allowed[..., self.policy.media_token] = float("-inf")
        if sampling.temperature == 0:
            token = allowed.argmax(-1)
        else:
            flat = allowed.flatten(0, 1)
            if sampling.top_p < 1:
                flat = TopPLogitsWarper(sampling.top_p)(None, flat)
            cdf = flat.double().softmax(-1).cumsum(-1)  # (B * G, V)
            # The first token whose cumulated probability exceeds the uniform number.
            u = uniform.flatten()[:, None] * cdf[:, -1:]
            token = torch.searchsorted(cdf, u, right=True).view(logits.shape[:-1])
        # DEVIATION 1: logp is that of the full softmax
        return token, logp.gather(-1, token[..., None])[..., 0]

    def _response(self, tokens, logps, length: int, finished: bool) -> Response:
        ids = tokens[:length].clone()
        text = self.policy.tokenizer.decode(ids[:-1] if finished else ids)
        return Response(ids, logps[:length].clone(), text, finished)
