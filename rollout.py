"""Rollout: sample G answers to each prompt, and keep the sampler's log-probs.

Two engines behind one interface, in lock-step with the trainer: they get the same Prompt, from the
embeddings that were computed once, and their log-probs are compared with the trainer's every step.

    generate(prompts, n, sampling, seeds) -> B lists of n Response
    sync(model)    take over new weights; what was cached with the old ones is dropped
    sleep()        give memory back, so that engine and trainer share a GPU; the next call wakes it
    check_fits(prompt, sampling, name)   RolloutError if the prompt is too long
    close()        the end
    tp, prefilled  how many ranks share an engine; prompt tokens that were computed so far

sample() deals prompts to the engines of the ranks that train a sequence together. VLLMEngine
(kit/vllm_engine.py), for GPUs, has vLLM run the decoder. TorchEngine is plain PyTorch, here.
The G answers of a prompt grow side by side behind ONE copy of its keys and values; rule (*) of
mrsp.py says who sees whom, so no cache is ever copied G times:

    cache of a row:   [ prompt, P keys | step 0: r_1 .. r_G | step 1: r_1 .. r_G | ... ]
    queries:            r_1 .. r_G   each sees the prompt and its own earlier tokens

Copied alone it needs mrsp.py, and AttentionInterface.register("mrsp", mrsp_attention) to be called.
TorchEngine wants a model, a torch.nn.Module (such as model.MultiModal) that has

    policy               .model, a decoder of transformers with attention "mrsp"; .lm_head, .config,
                         and .inputs(ids, media, media_at), keywords of .model: inputs_embeds
                         (B, L, D), or more
    tokenizer, ends      decode(ids) -> text; ids of the tokens that end an answer
    media_tokens         ids that are never sampled, or ()
    media_width          W, width of the features of prompts
    sharded              are the parameters sharded (FSDP2)? Then the engine needs a dtype
    only with a dtype    decoder_weights(): (name, whole tensor) as in policy.state_dict(), without
                         a tied head; read_decoder(); tower, projector, cache, mesh: are shared
and prompts with ids (P,), positions (P,) or (3, P), media (N, W) or None, media_at (N,).

DEVIATION 1: the log-prob that is kept is that of the full softmax at the given temperature, also
    under top-p and top-k (the trainer computes the same one, so that their ratio starts at 1).
DEVIATION 2: media tokens are never sampled: a policy could write itself a video.

Glossary: B prompts, G answers each, P longest prompt, N media features, D width, W width of media,
V vocabulary, t decode step. Check this file alone:  pytest tests/test_rollout.py tests/test_vllm.py
"""

import copy
import itertools
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, TopKLogitsWarper, TopPLogitsWarper

from mrsp import Layout, Mesh, gather_dealt, pack


class RolloutError(RuntimeError):
    """The engine cannot sample: what is wrong and what to do."""


@dataclass(frozen=True)
class Sampling:
    """How to sample. temperature 0 is greedy."""

    temperature: float = 1.0
    top_p: float = 1.0  # the most likely tokens, up to this probability
    max_tokens: int = 2048
    top_k: int = 0  # the k most likely tokens; 0: all
    stop: str = ""  # a text that ends an answer, besides the end token; it stays in it

    def __post_init__(self):
        counts = self.max_tokens >= 1 and self.top_k >= 0
        if self.temperature < 0 or not 0 < self.top_p <= 1 or not counts:
            need = "temperature >= 0, 0 < top_p <= 1, top_k >= 0, max_tokens >= 1"
            raise ValueError(f"need {need}: {self}")


@dataclass
class Response:
    """One sampled answer. ids (R,) with the end token if it was reached; logps (R,) float32, of
    the sampler, at its temperature (greedy: at 1); finished: ended by itself (end token, or a stop
    text), not cut at max_tokens."""

    ids: Tensor
    logps: Tensor
    text: str
    finished: bool


def check_request(model, prompts, n: int, sampling: Sampling, seeds) -> list[int]:
    """The seeds of the prompts (default 0, 1, ...); ValueError for what no engine can sample."""
    if n < 1 or (n > 1 and sampling.temperature == 0):
        raise ValueError(f"n = {n}: greedy sampling gives one answer; use n = 1 or a temperature")
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    width = model.media_width
    for i, prompt in enumerate(prompts):
        media = torch.empty(0, width) if prompt.media is None else prompt.media
        if media.shape != (len(prompt.media_at), width):
            raise ValueError(
                f"prompt {i}: media features are {tuple(media.shape)}, but the prompt has "
                f"{len(prompt.media_at)} media tokens and the decoder takes them {width} wide: "
                "they come from another model, or from another version of this one"
            )
    return seeds


def response(model, ids: Tensor, logps: Tensor, finished: bool) -> Response:
    """ids (R,) and logps (R,) with their text, without the end token."""
    ended = len(ids) > 0 and ids[-1].item() in model.ends
    return Response(ids, logps, model.tokenizer.decode(ids[:-1] if ended else ids), finished)


def in_parts(sizes: list[int], limit: int, count: int | None = None) -> list[slice]:
    """Slices of consecutive items, at most `count` in each. A slice takes at most `limit`, where
    each item takes as much as the largest of them (padding); or it is one item that takes more.

    >>> in_parts([3, 3, 1, 9, 2], 6)
    [slice(0, 2, None), slice(2, 3, None), slice(3, 4, None), slice(4, 5, None)]
    """
    cuts = [0]
    for i in range(1, len(sizes)):
        together = i + 1 - cuts[-1]  # with item i
        if max(sizes[cuts[-1] : i + 1]) * together > limit or together > (count or together):
            cuts.append(i)
    return [slice(a, b) for a, b in itertools.pairwise([*cuts, len(sizes)]) if a < b]


def sample(engine, prompts, seeds, n: int, sampling: Sampling, mesh: Mesh) -> list[list[Response]]:
    """n answers to each prompt of this rank's sequence, in order. All S ranks of a sequence call
    this with the same prompts and seeds, and get the same answers: rank r samples for prompts r,
    r + S, ... (with tensor parallelism the engine.tp ranks of an engine are dealt the same ones),
    then they exchange what they have. engine.prefilled counts what this rank's engine computed."""
    mine = slice(mesh.sp_rank // engine.tp, None, mesh.sp // engine.tp)
    own = engine.generate(prompts[mine], n, sampling, seeds[mine])
    answers = gather_dealt(own, len(prompts), mesh.sp_group, engine.tp)
    engine.sleep()
    return answers


# ------------------------------------------------------------------------------- plain PyTorch


class TorchEngine:
    """Samples with the model's own weights, see the opening. By inverse transform: ONE uniform
    number a token, from a generator seeded for the prompt, so that an answer depends on its seed
    and not on batch, rank or order. (vLLM draws other numbers: other answers, as likely.)"""

    tp = 1  # ranks that share an engine

    def __init__(self, model, batch_prompts: int = 64, dtype=None, batch_tokens: int = 2**17):
        """At most batch_prompts prompts at a time, and batch_tokens tokens of them, padding too
        (their K/V: 57 KB each in a 7B). dtype: sample from a copy of the decoder in this precision,
        made before the model's parameters are sharded. None: from the model's own weights."""
        self.model = model
        self.copied = dtype is not None
        if self.copied:
            self.model = copy_policy(model, dtype)
            self.model.read_decoder()
        self.batch_prompts = batch_prompts
        self.batch_tokens = batch_tokens
        self.prefilled = 0  # prompt tokens computed so far

    @torch.no_grad()
    def sync(self, model) -> None:
        if self.copied:
            own = self.model.policy.state_dict()
            for name, new in model.decoder_weights():  # one by one: two full copies never exist
                own[name].copy_(new)
        elif model.sharded:
            raise ValueError("give TorchEngine a dtype: sharded weights are sampled from a copy")
        else:
            self.model = model

    def sleep(self, *_) -> None:
        """Nothing: no memory is held between calls, and nothing else limits a prompt."""

    close = check_fits = sleep

    @torch.inference_mode()
    def generate(self, prompts, n: int, sampling: Sampling, seeds=None) -> list[list[Response]]:
        """n answers to each prompt. seeds: one int a prompt (default 0, 1, ...)."""
        seeds = check_request(self.model, prompts, n, sampling, seeds)
        self.prefilled += sum(len(prompt.ids) for prompt in prompts)
        was_training = self.model.training
        self.model.eval()
        try:
            out = []
            lengths = [len(prompt.ids) for prompt in prompts]
            for part in in_parts(lengths, self.batch_tokens, self.batch_prompts):
                out += self._generate(prompts[part], n, sampling, seeds[part])
            return out
        finally:
            self.model.train(was_training)

    def _generate(self, prompts, n, sampling, seeds):
        device = next(self.model.parameters()).device
        # Uniform numbers of all decode steps, (steps, G) of a prompt, by a generator of its own.
        rows = []
        for seed in seeds:
            stream = torch.Generator().manual_seed(seed)
            rows.append(torch.rand(sampling.max_tokens, n, generator=stream, dtype=torch.float64))
        uniform = torch.stack(rows).to(device)  # (B, steps, G)

        # Prefill (B, P). All answers of a prompt start from the state of its last token.
        alone = pack(prompts, [[] for _ in prompts])  # without answers
        cache = DynamicCache(config=self.model.policy.config)
        inputs = (alone.ids, alone.media, alone.media_at)
        states = self._states(cache, alone.layout, alone.positions, *inputs)  # (B, P, D)
        segment, order = alone.segment, alone.order
        length = torch.tensor([len(prompt.ids) for prompt in prompts], device=device)
        last = states[torch.arange(len(prompts), device=device), length - 1]  # (B, D)
        hidden = last[:, None].expand(-1, n, -1)  # (B, G, D)

        # Decode, a token of all answers at a time, until all have ended.
        after = torch.stack([prompt.positions.max() + 1 for prompt in prompts]).to(device)
        ends = torch.tensor(list(self.model.ends), dtype=torch.long, device=device)
        columns = torch.arange(1, n + 1, device=device).repeat(len(prompts), 1)  # segments (B, G)
        alive = torch.ones_like(columns, dtype=torch.bool)
        tokens, logps, lives = [], [], []
        for t in range(sampling.max_tokens):
            logits = self.model.policy.lm_head(hidden)  # (B, G, V)
            token, logp = self._sample(logits, uniform[:, t], sampling)
            tokens.append(token)
            logps.append(logp)
            lives.append(alive)
            alive = alive & ~torch.isin(token, ends)
            if sampling.stop:
                alive = alive & ~self._at_stop(torch.stack(tokens, -1), alive, sampling.stop)
            if not alive.any() or t + 1 == sampling.max_tokens:
                break
            now = (length + t)[:, None].expand(-1, n)  # order of these tokens, (B, G)
            segment = torch.cat([segment, columns], 1)
            order = torch.cat([order, now], 1)
            position = (after + t)[:, None].expand(-1, n)
            if alone.positions.ndim == 3:  # M-RoPE: text has three equal rows
                position = position.expand(3, -1, -1)
            layout = Layout(columns, now, segment, order)
            hidden = self._states(cache, layout, position, token)
        ids, logps, real = (torch.stack(x, -1).cpu() for x in (tokens, logps, lives))  # (B, G, t)
        done = ~alive.cpu()
        out = [[] for _ in prompts]
        for i, g in itertools.product(range(len(prompts)), range(n)):
            own = real[i, g]  # what is behind the end was sampled, and is none of the answer
            out[i].append(response(self.model, ids[i, g, own], logps[i, g, own], bool(done[i, g])))
        return out

    def _states(self, cache, layout: Layout, positions: Tensor, *tokens) -> Tensor:
        """Hidden states (B, L, D) of more tokens (ids, media, media_at); the cache takes them."""
        inputs = self.model.policy.inputs(*tokens)
        known = dict(past_key_values=cache, use_cache=True, mrsp=layout)
        return self.model.policy.model(**inputs, position_ids=positions, **known).last_hidden_state

    def _at_stop(self, tokens: Tensor, alive: Tensor, stop: str) -> Tensor:
        """tokens (B, G, t) so far -> (B, G): those alive that have come to the stop text."""
        out = torch.zeros_like(alive)
        tail = 4 * len(stop) + 4  # bytes of it, if each is a token
        for i, g in alive.nonzero().tolist():
            out[i, g] = stop in self.model.tokenizer.decode(tokens[i, g, -tail:])
        return out

    def _sample(self, logits: Tensor, uniform: Tensor, sampling: Sampling):
        """logits (B, G, V), uniform (B, G) in [0, 1) -> tokens and their log-probs (B, G)."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        cooled = logits.to(wide) / (sampling.temperature or 1.0)
        logp = cooled.log_softmax(-1)
        allowed = cooled.clone()  # DEVIATION 2: no media tokens
        allowed[..., list(self.model.media_tokens)] = float("-inf")
        if sampling.temperature == 0:
            token = allowed.argmax(-1)
        else:
            flat = allowed.flatten(0, 1)
            if sampling.top_k:
                flat = TopKLogitsWarper(sampling.top_k)(None, flat)
            if sampling.top_p < 1:
                flat = TopPLogitsWarper(sampling.top_p)(None, flat)
            cdf = flat.double().softmax(-1).cumsum(-1)  # (B * G, V)
            # The first token whose cumulated probability exceeds the uniform number.
            u = uniform.flatten()[:, None] * cdf[:, -1:]
            token = torch.searchsorted(cdf, u, right=True).view(logits.shape[:-1])
        # DEVIATION 1: logp is that of the full softmax
        return token, logp.gather(-1, token[..., None])[..., 0]


def copy_policy(model, dtype):
    """The model with a policy of its own in this precision; what does not change is shared."""
    shared = (model.tower, model.projector, model.cache, model.tokenizer, model.mesh)
    known = {id(part): part for part in shared}  # deepcopy takes these as the copies
    # Not policy.to(dtype): RoPE's frequencies, a buffer, stay float32, as they do under FSDP.
    for p in model.policy.parameters():  # in this precision at once, never a second float32
        known[id(p)] = torch.nn.Parameter(p.detach().to(dtype, copy=True))
    return copy.deepcopy(model, known)
