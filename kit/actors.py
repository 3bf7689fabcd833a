"""Actors: the models of a run, in the order in which they have to be made.

    load            whole on every rank; of what is going to be sharded, no weights of the decoder
    copies          the PyTorch sampler and the reference, while it is whole (LoRA needs no copy:
                    the reference is the policy with its adapters switched off)
    shard           FSDP2: policy and reference, of which each rank reads its own part
    vLLM            last: it takes of a GPU what sharding leaves

    policy --sync--> sampler          the policy as it is now, after every step
           --copy--> reference        the policy as GRPO begins; none if there is no KL term

Check this file alone:  pytest tests/test_train.py
"""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

import grpo
from kit.method import Method
from kit.run import Run
from kit.vllm_engine import make_engine
from model import MultiModal
from rollout import Sampling, copy_policy


@dataclass
class Actors:
    """Who takes part in GRPO, and by which settings."""

    model: MultiModal  # the policy, which is trained
    reference: MultiModal | None  # what KL is taken to; None: see referring(), or kl_coef is 0
    engine: object  # samples: rollout.TorchEngine or VLLMEngine
    optimizer: torch.optim.Optimizer | None  # from begin_grpo on
    method: Method
    config: grpo.Config
    seed: int = 0
    lost: dict | None = None  # takes {row: why it is left out}; None: a bad row ends the run

    @contextmanager
    def referring(self):
        """The reference: a copy of the decoder, or the policy itself without its adapters."""
        if self.config.lora_rank:
            with self.model.without_adapters():
                yield self.model
        else:
            yield self.reference

    @property
    def sampling(self) -> Sampling:
        """How answers are sampled in training."""
        c, recipe = self.config, self.model.recipe
        return Sampling(c.temperature, c.top_p, recipe.max_tokens, c.top_k, recipe.stop)


def make_actors(run: Run, method: Method, kind: str) -> Actors:
    """Policy, reference and sampler (of this kind, see vllm_engine.engine_kind); all ranks."""
    s = run.settings
    dtype = getattr(torch, s.ranks.dtype)
    model = run.load_policy(s.run.model, whole=not s.ranks.fsdp)
    if dtype != torch.float32 and (s.sft.train == "llm" or not s.run.sft_data):
        model.cast_encoder(dtype)  # it is not trained
    engine, reference = None, None
    if kind == "torch":
        engine = make_engine(kind, model, dtype=dtype, copied=s.ranks.fsdp)
    if s.grpo.kl_coef and not s.grpo.lora_rank:
        reference = copy_policy(model, dtype)
    if s.ranks.fsdp:
        model.shard_parameters(dtype)
        if reference is not None:
            reference.shard_parameters(dtype)
    if engine is None:
        engine = make_engine(kind, model, s.rollout, dtype)
        engine.sleep()
    seed = s.more.seed if s.more.rl_seed is None else s.more.rl_seed
    return Actors(model, reference, engine, None, method, s.grpo, seed, run.lost)


def begin_grpo(a: Actors) -> None:
    """Sampler and reference become the policy as it is now. What is trained is its decoder, or
    adapters to it: tower and projector are frozen in RL, as for VILA in the paper."""
    a.engine.sync(a.model)
    a.model.requires_grad_(False)
    a.model.policy.requires_grad_(True)
    if a.reference is not None:
        a.reference.requires_grad_(False)
        with torch.no_grad():
            for own, new in zip(a.reference.policy.parameters(), a.model.policy.parameters()):
                own.copy_(new)  # sharded alike: each rank copies its own share
    if a.config.lora_rank:
        a.model.add_adapters(a.config.lora_rank, a.config.lora_alpha, a.seed)
    trained = [p for p in a.model.parameters() if p.requires_grad]
    a.optimizer = torch.optim.AdamW(trained, a.config.lr, weight_decay=a.config.weight_decay)
