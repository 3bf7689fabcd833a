"""Train LongVILA-R1: [base] -> chain-of-thought SFT -> GRPO -> evaluation. The story of a run.

    torchrun --nproc_per_node 2 train.py            the whole pipeline on a toy, on two CPU cores
    python train.py                                 the same in one process
    torchrun --nproc_per_node 2 train.py --help     every setting, with a sentence each

One GRPO step (section 4 of the paper; grpo_step below tells it in this order):

    rows -> features (cached) -> prompts -> rollout: G answers each       engine.generate
         -> reward (B, G) -> advantage (B, G)                             grpo.py
         -> pack [prompt | r_1 ... r_G] -> log-probs -> loss -> backward  mrsp.py, model.py
         -> optimizer -> engine.sync

Ranks are data-parallel: each takes every world-th prompt of a batch, gradients are summed, and the
loss is divided by global counts, so that any number of ranks trains the same model.

The toy is the real thing, small: mp4 files, decord, the VILA classes from a checkpoint folder,
every stage. Its two "base" stages stand for the pretrained model that the paper starts from.

Outputs (--output_dir): summary.json, metrics.jsonl, samples.jsonl, curves.png, frames.png, sft/
and model/ (checkpoints in VILA's layout, with recipe.json for eval.py), data/ (the toy's).
Each metric is explained in METRICS.

Check this file alone:  pytest tests/test_train.py
"""

import copy
import inspect
import json
import os
import re
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import data
import eval as evaluation
import grpo
import mrsp
import sft
from data import DataError, ToyConfig
from model import THINKING, VILA, ModelError
from rollout import Sampling, TorchEngine
from sft import SFTConfig

METRICS = {
    "loss": "supervised: mean negative log-likelihood; GRPO: the policy loss (near 0 on-policy)",
    "grad_norm": "norm of the gradient before clipping",
    "lr": "learning rate of AdamW at this step",
    "tokens": "target tokens of the step, over all ranks",
    "reward": "mean reward of all sampled answers",
    "accuracy": "share of sampled answers that are right",
    "format": "share of sampled answers in the <think> <answer> format",
    "length": "mean tokens of an answer",
    "finished": "share of answers that ended by themselves, not at max_tokens",
    "skipped_groups": "prompts whose answers all got the same reward: nothing to learn, not trained",
    "clip_fraction": "share of trained tokens whose gradient a clip cut off; 0 on-policy",
    "kl": "mean k3 estimate of KL(policy || reference); 0 if the coefficient is 0",
    "entropy": "mean entropy (nats) of the policy at the trained tokens",
    "mismatch_mean": "mean |log-prob of the sampler - log-prob of the trainer|, first update",
    "mismatch_max": "the largest of those; near 0, or sampler and trainer see different inputs",
    "seconds_rollout": "decoding, encoding and sampling",
    "seconds_train": "log-probs, backward, optimizer",
}


@dataclass(frozen=True)
class RunConfig:
    """What to run, on what."""

    output_dir: str = "runs/toy"  # where everything is written
    seed: int = 0  # of data, weights, batches and sampling
    num_frames: int = 64  # frames taken from a video
    template: str = THINKING  # the user's turn in thinking mode; {problem} is the question
    system: str | None = None  # system prompt; None leaves the turn out
    careful_prefill: str = "<think> seen"  # control: the SFT model, forced to begin like this
    frame_counts: str = "8,16,32,64"  # frames of the scaling curve
    show_every: int = 20  # GRPO steps between two decoded rollouts in samples.jsonl


@dataclass(frozen=True)
class GRPOConfig(grpo.LossConfig):
    """The GRPO stage; defaults are the released ones of Long-RL where they are stated."""

    data: str = "rl.jsonl"  # rows; the path is relative to the data directory
    steps: int = 100  # rollout batches
    prompts: int = 512  # prompts of a rollout batch, over all ranks
    update_prompts: int = 128  # prompts of one optimizer step; fewer than prompts: off-policy
    micro_prompts: int = 1  # prompts in one forward pass of a rank
    group: int = 8  # G, answers to each prompt
    temperature: float = 1.0  # of sampling, and of the log-probs that are trained
    top_p: float = 0.99  # nucleus of sampling
    max_tokens: int = 2048  # longest answer
    accuracy_weight: float = 0.9  # reward of a right answer
    format_weight: float = 0.1  # reward of the right format
    scale_std: bool = True  # divide advantages by the group's standard deviation
    lr: float = 1e-6  # AdamW, constant
    weight_decay: float = 1e-2  # decoupled weight decay
    grad_clip: float = 1.0  # largest norm of the gradient
    max_mismatch: float = 1.0  # stop if a token's log-prob differs by more: inputs are not the same


@dataclass(frozen=True)
class Preset:
    """All settings of a run; every field of every part is an option --PART_FIELD (--FIELD for
    run's)."""

    run: RunConfig = field(default_factory=RunConfig)
    toy: ToyConfig = field(default_factory=ToyConfig)
    images: SFTConfig = field(default_factory=SFTConfig)
    base: SFTConfig = field(default_factory=SFTConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    grpo: GRPOConfig = field(default_factory=GRPOConfig)


PRESETS = {
    "toy": Preset(
        run=RunConfig(template="{problem} Think, then answer."),
        images=SFTConfig(
            data="base_images.jsonl", steps=80, groups=128, texts=4, micro_batches=4, train="all",
            optimizer="muon", lr=2e-3, thinking=False,
        ),
        base=SFTConfig(
            data="base.jsonl", steps=600, groups=32, texts=4, micro_batches=4, train="llm",
            optimizer="muon", lr=2e-3, thinking=False,
        ),
        sft=SFTConfig(data="sft.jsonl", steps=40, groups=16, texts=8, train="llm", lr=7e-4),
        grpo=GRPOConfig(
            steps=200, prompts=32, update_prompts=32, micro_prompts=16, max_tokens=24, top_p=1.0,
            lr=3e-4, weight_decay=0.0, kl_coef=0.0, scale_std=False,
        ),
    ),
}  # fmt: skip


def sentences(cls) -> dict[str, str]:
    """The comment behind each field of a config dataclass: its help text."""
    found = {}
    for base in reversed([c for c in cls.__mro__ if c is not object]):
        found |= dict(re.findall(r"^    (\w+):.*?  # (.+)$", inspect.getsource(base), re.MULTILINE))
    return found


def parse_options(argv: list[str]) -> Preset:
    """Command line -> Preset. --preset NAME gives the defaults; an unknown option is an error."""
    import argparse

    from transformers import HfArgumentParser

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=list(PRESETS), default="toy")
    chosen, rest = first.parse_known_args(argv)
    preset = PRESETS[chosen.preset]
    parts = {f.name: getattr(preset, f.name) for f in fields(Preset)}
    flat = []
    for name, part in parts.items():
        helps, prefix = sentences(type(part)), "" if name == "run" else name + "_"
        columns = [
            (
                prefix + f.name,
                f.type,
                field(default=getattr(part, f.name), metadata={"help": helps[f.name]}),
            )
            for f in fields(part)
        ]
        flat.append(make_dataclass(name, columns, frozen=True))
    parser = HfArgumentParser(flat, allow_abbrev=False)
    parser.add_argument("--preset", choices=list(PRESETS), default="toy", help="named settings")
    *values, _, unknown = parser.parse_args_into_dataclasses(rest, return_remaining_strings=True)
    if unknown:
        raise DataError(f"unknown option {' '.join(unknown)}; see python train.py --help")
    built = {}
    for (name, part), value in zip(parts.items(), values):
        prefix = "" if name == "run" else name + "_"
        built[name] = type(part)(**{k.removeprefix(prefix): v for k, v in asdict(value).items()})
    return Preset(**built)


# ------------------------------------------------------------------------------------- one run


class Run:
    """Ranks, files and clocks of a run: everything around the method."""

    def __init__(self, preset: Preset):
        self.preset, self.config = preset, preset.run
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
        if self.world > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")
        self.out = Path(self.config.output_dir)
        self.out.mkdir(parents=True, exist_ok=True)
        self.cache = mrsp.EmbeddingCache()
        self.seconds, self.started = {}, time.time()
        if self.rank == 0:
            for name in ("metrics.jsonl", "samples.jsonl"):
                (self.out / name).write_text("")

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def bar(self, name: str, total: int | None = None):
        """A progress bar with the time left, on rank 0."""
        from tqdm import tqdm

        return lambda items: tqdm(
            items, desc=name, total=total, disable=self.rank > 0, mininterval=1
        )

    def log(self, stage: str):
        def write(step: int, metrics: dict) -> None:
            if self.rank == 0:
                with open(self.out / "metrics.jsonl", "a") as file:
                    file.write(json.dumps({"stage": stage, "step": step} | metrics) + "\n")

        return write

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def stage(self, name: str):
        """Context manager: names a stage on the terminal and takes its time."""
        run = self

        class Stage:
            def __enter__(self):
                self.start = time.time()

            def __exit__(self, *error):
                run.seconds[name] = run.seconds.get(name, 0.0) + time.time() - self.start

        return Stage()

    def evaluate(self, model, examples, name: str, num_frames=None, prefill="") -> dict:
        with self.stage("eval"):
            return evaluation.evaluate(
                model, TorchEngine(model), examples, num_frames or self.config.num_frames,
                self.preset.grpo.max_tokens, self.config.template, self.config.system, prefill,
                self.cache, rank=self.rank, world=self.world, bar=self.bar(f"eval {name}"),
            )  # fmt: skip

    def sample(self, step: int, sample: tuple) -> None:
        """One prompt with its answers, decoded, with the parts of their rewards."""
        if self.rank > 0 or not sample[0]:
            return
        example, prompt, answers, parts = sample
        line = {
            "step": step,
            "problem_id": example.id,
            "question": example.problem,
            "answer": example.answer,
            "num_frames": len(prompt.media) if prompt.media is not None else 0,
            "prompt": prompt.text,
            "responses": [{"text": a.text} | p for a, p in zip(answers, parts)],
        }
        with open(self.out / "samples.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        if self.world > 1:
            dist.destroy_process_group()

    def save(self, model, name: str) -> None:
        """Checkpoint folder, with what eval.py needs to ask the same questions again."""
        if self.rank == 0:
            folder = self.out / name
            model.save_pretrained(folder)
            recipe = {
                "num_frames": self.config.num_frames,
                "max_tokens": self.preset.grpo.max_tokens,
                "template": self.config.template,
                "system": self.config.system,
                "data": "../data/test.jsonl",
            }
            (folder / "recipe.json").write_text(json.dumps(recipe, indent=2))
        self.barrier()


# --------------------------------------------------------------------------------------- GRPO


def rewards_of(answers: list, example, config: GRPOConfig) -> list[dict]:
    """Reward and its parts of each answer: 0.9 accuracy + 0.1 format (section 4)."""
    out = []
    for a in answers:
        right, form = (
            grpo.accuracy_reward(a.text, example.answer, example.options),
            grpo.format_reward(a.text),
        )
        reward = config.accuracy_weight * right + config.format_weight * form
        out.append({"reward": reward, "accuracy": right, "format": form})
    return out


def grpo_step(run, model, reference, engine, optimizer, batch: list, step: int, config: GRPOConfig):
    """One rollout batch and its updates. batch: the global list of Examples; this rank takes every
    world-th of each update's share. Returns the step's metrics (equal on all ranks) and this
    rank's first sample."""
    trained = [p for p in model.parameters() if p.requires_grad]
    sums = defaultdict(float)  # of this rank, added up over the ranks at the end
    clock = time.time()

    # 1. Rollout. One Prompt for sampler, policy and reference.
    starts = range(0, len(batch), config.update_prompts)
    shares = [batch[i : i + config.update_prompts][run.rank :: run.world] for i in starts]
    examples = [e for share in shares for e in share]
    prompts = []
    for e in examples:
        features = model.features(e, run.config.num_frames, run.cache)
        prompts.append(model.build_prompt(e, features, run.config.template, run.config.system))
    index = {id(e): i for i, e in enumerate(batch)}  # seeds follow the prompt, not the rank
    seeds = [(run.config.seed * 10**6 + step) * 10**6 + index[id(e)] for e in examples]
    sampling = Sampling(config.temperature, config.top_p, config.max_tokens)
    engine.wake()
    answers = engine.generate(prompts, config.group, sampling, seeds)
    engine.sleep()

    # 2. Reward and advantage, (b, G). Groups of equal rewards have advantage 0 and are left out;
    # their tokens still count in the mean, so that leaving them out changes nothing but the time.
    graded = [rewards_of(a, e, config) for a, e in zip(answers, examples)]
    rewards = torch.tensor([[p["reward"] for p in group] for group in graded]).view(
        -1, config.group
    )
    advantage = grpo.advantages(rewards, config.scale_std)
    useful = grpo.informative(rewards) | (config.kl_coef > 0)
    flat = [(a, p) for group, ps in zip(answers, graded) for a, p in zip(group, ps)]
    for a, p in flat:
        for name in ("reward", "accuracy", "format"):
            sums[name] += p[name]
        sums["length"] += len(a.ids)
        sums["finished"] += a.finished
        sums["answers"] += 1
    sums["skipped_groups"] = float((~useful).sum())
    sums["seconds_rollout"], clock = time.time() - clock, time.time()

    # 3. Pack the groups of each update, and take the log-probs that must precede any update.
    model.train()
    updates, first = [], 0
    for u, share in enumerate(shares):
        mine = range(first, first + len(share))
        first += len(share)
        counts = torch.tensor([sum(len(a.ids) for a in answers[i]) for i in mine] or [0]).sum()
        total_tokens = mrsp.all_sum(counts.double())
        total_answers = mrsp.all_sum(torch.tensor(float(len(share) * config.group)))
        kept, micro = [i for i in mine if useful[i]], []
        for k in range(0, len(kept), config.micro_prompts):
            rows = kept[k : k + config.micro_prompts]
            packed = mrsp.pack(
                [prompts[i] for i in rows], [[a.ids for a in answers[i]] for i in rows]
            )
            sampled, _ = packed.pad(
                torch.cat([a.logps for i in rows for a in answers[i]]).to(packed.ids.device)
            )
            old = ref = None
            with torch.no_grad():
                if u > 0:  # on-policy in the first update: nothing to compute
                    old, _ = packed.pad(model(packed, config.temperature)[0])
                if config.kl_coef:
                    ref, _ = packed.pad(reference(packed, config.temperature)[0])
            micro.append((packed, advantage[rows].to(packed.ids.device), sampled, old, ref))
        updates.append((micro, total_tokens.item(), total_answers.item()))

    # 4. Loss, backward, optimizer step.
    for u, (micro, total_tokens, total_answers) in enumerate(updates):
        for packed, adv, sampled, old, ref in micro:
            flat_logp, entropy = model(packed, config.temperature)
            logp, mask = packed.pad(flat_logp)
            loss, parts = grpo.grpo_loss(
                logp, adv, mask, config, old, ref, total_tokens, total_answers
            )
            loss.backward()
            for name, value in parts.items():
                sums[name] += value.item()
            sums["loss"] += loss.item() / len(updates)
            sums["entropy"] += entropy.sum().item()
            if u == 0:  # the sampler's log-probs against the trainer's, before anything changed
                gap = ((logp.detach() - sampled) * mask).abs()
                sums["gap"] += gap.sum().item()
                sums["gap_tokens"] += mask.sum().item()
                sums["gap_max"] = max(sums["gap_max"], gap.max().item())
        mrsp.all_reduce_gradients(trained)
        norm = torch.nn.utils.clip_grad_norm_(trained, config.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        sums["grad_norm"] += norm.item() / len(updates) / run.world
    engine.sync(model)
    sums["seconds_train"] = time.time() - clock

    sample = (examples[0], prompts[0], answers[0], graded[0]) if examples else ()
    return reduce_metrics(sums, run, config), sample


def reduce_metrics(sums: dict, run: Run, config: GRPOConfig) -> dict:
    """Sums of this rank -> the step's metrics over all ranks (see METRICS)."""
    names = (
        "reward accuracy format length finished answers skipped_groups tokens clipped kl entropy "
        "loss grad_norm gap gap_tokens ratio_error seconds_rollout seconds_train"
    ).split()
    total = dict(zip(names, mrsp.all_sum(torch.tensor([sums[n] for n in names]).double()).tolist()))
    largest = torch.tensor(sums["gap_max"])
    if run.world > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    if largest > config.max_mismatch:
        raise ModelError(
            f"a sampled token's log-prob differs by {largest:.3f} between sampler and trainer (limit "
            f"--grpo_max_mismatch {config.max_mismatch}): they see different inputs or weights"
        )
    answers, tokens = max(total["answers"], 1), max(total["tokens"], 1)
    out = {n: total[n] / answers for n in ("reward", "accuracy", "format", "length", "finished")}
    out |= {"clip_fraction": total["clipped"] / tokens}
    out |= {n: total[n] / tokens for n in ("kl", "entropy")}
    out |= {n: total[n] for n in ("loss", "grad_norm", "skipped_groups", "tokens")}
    out |= {"mismatch_mean": total["gap"] / max(total["gap_tokens"], 1)}
    out |= {"mismatch_max": largest.item(), "lr": config.lr}
    out |= {n: total[n] / run.world for n in ("seconds_rollout", "seconds_train")}
    return out


# ------------------------------------------------------------------------------- the toy model


def toy_checkpoint(folder: str, data_dir: Path, template: str, seed: int) -> None:
    """A VILA of 0.9 M parameters with random weights, in a checkpoint folder like any other."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # One token a word: the words of the data; white space and light punctuation are dropped.
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<vila/video>"]
    special += ["<think>", "</think>", "<answer>", "</answer>"]
    texts = ["user assistant system " + template.replace("{problem}", "")]
    for name in ("base_images", "base", "sft", "rl", "test", "test_other"):
        for e in data.load_rows(str(data_dir / f"{name}.jsonl")):
            texts += [e.problem, e.response]
    words = sorted(set(re.findall(r"[^\s.,:?]+", " ".join(texts))) - set(special))
    core = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(special + words)}, unk_token="<|endoftext|>")
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s.,:?]+"), "removed")
    core.add_special_tokens([AddedToken(w, normalized=False) for w in special])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    torch.manual_seed(seed)
    VILA.create(
        config={
            "model_type": "llava_llama",
            "mm_projector_type": "mlp_downsample",
            "mm_vision_select_layer": -1,
            "video_encoder": {"_target_": "llava.model.encoders.BasicVideoEncoder", "end_tokens": None},
            "video_token": "<vila/video>",
        },
        llm=dict(
            vocab_size=len(special + words), hidden_size=128, intermediate_size=384,
            num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.05,
            tie_word_embeddings=True, max_position_embeddings=4096, eos_token_id=2, pad_token_id=0,
            bos_token_id=None,
        ),
        tower=dict(
            image_size=data.SIZE, patch_size=16, hidden_size=64, intermediate_size=128,
            num_hidden_layers=2, num_attention_heads=4, vision_use_head=False,
        ),
        tokenizer=tokenizer,
        preprocess={"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255},
    ).save_pretrained(folder)  # fmt: skip


# ---------------------------------------------------------------------------------------- main


def supervised(run: Run, model, config: SFTConfig, name: str, data_dir: Path, seed: int) -> None:
    """One supervised stage of the run: sft.train on the rows that its config names."""
    rows = data.load_rows(str(data_dir / config.data))
    with run.stage(name):
        sft.train(
            model, rows, config, run.config.num_frames, run.config.template, run.cache,
            run.config.system, run.rank, run.world, None, seed, run.bar(name, config.steps), run.log(name),
        )  # fmt: skip


def train_grpo(run: Run, model, config: GRPOConfig, rows: list) -> None:
    """The GRPO stage: config.steps rollout batches."""
    model.requires_grad_(False)
    model.llm.requires_grad_(True)  # tower and projector are frozen in RL, as for VILA in the paper
    reference = copy.deepcopy(model).requires_grad_(False) if config.kl_coef else None
    engine = TorchEngine(model)
    optimizer = torch.optim.AdamW(
        model.llm.parameters(), lr=config.lr, betas=(0.9, 0.999), weight_decay=config.weight_decay
    )
    log, order = run.log("grpo"), sft.batches(rows, config.prompts, config.steps, run.config.seed)
    with run.stage("grpo"):
        bar = run.bar("grpo", config.steps)(order)
        for step, batch in enumerate(bar):
            metrics, sample = grpo_step(
                run, model, reference, engine, optimizer, batch, step, config
            )
            log(step, metrics)
            bar.set_postfix_str(
                f"accuracy {metrics['accuracy']:.2f} length {metrics['length']:.0f}"
            )
            if step % run.config.show_every == 0 or step + 1 == config.steps:
                run.sample(step, sample)


def toy_pipeline(run: Run) -> dict:
    """Everything on the toy: data, base, SFT, GRPO, evaluation. Returns the summary."""
    preset, config = run.preset, run.config
    data_dir = run.out / "data"
    with run.stage("data"):
        data.toy_build(
            str(data_dir), preset.toy, config.seed, run.rank, run.world, run.bar("videos")
        )
        if run.rank == 0:
            toy_checkpoint(str(run.out / "init"), data_dir, config.template, config.seed)
        run.barrier()
    model = VILA.from_pretrained(run.out / "init").to(run.device)
    supervised(run, model, preset.images, "images", data_dir, config.seed)
    supervised(run, model, preset.base, "base", data_dir, config.seed + 1)
    supervised(run, model, preset.sft, "sft", data_dir, config.seed + 2)
    run.save(model, "sft")

    test = data.load_rows(str(data_dir / "test.jsonl"))
    after_sft = run.evaluate(model, test, "SFT")
    control = run.evaluate(model, test, "control", prefill=config.careful_prefill)

    train_grpo(run, model, preset.grpo, data.load_rows(str(data_dir / preset.grpo.data)))
    run.save(model, "model")

    result = run.evaluate(model, test, "GRPO")
    by_frames = {
        str(n): run.evaluate(model, test, f"{n} frames", num_frames=n)["accuracy"]
        for n in map(int, config.frame_counts.split(","))
    }
    other = run.evaluate(model, data.load_rows(str(data_dir / "test_other.jsonl")), "other videos")
    wrong = run.evaluate(model, evaluation.swap_media(test), "wrong video")
    return {
        "seed": config.seed,
        "chance": sum(1 / len(e.options) for e in test) / len(test),
        "sft": {"accuracy": after_sft["accuracy"], "by_category": after_sft["by_category"]},
        "control": {"accuracy": control["accuracy"], "by_category": control["by_category"]},
        "grpo": {
            "accuracy": result["accuracy"],
            "by_category": result["by_category"],
            "by_frames": by_frames,
            "other_environment": other["accuracy"],
            "wrong_video": wrong["accuracy"],
        },
        "questions": result["questions"],
    }


PLAN = """\
LongVILA-R1 in miniature, {world} rank(s) on {device}, about {minutes} minutes on 2 cores:
  1 data    {videos} videos (mp4) with questions; train and test videos are disjoint
  2 base    a tiny VILA learns to see and to read: stands for the pretrained model
  3 SFT     chain-of-thought, with careful and hasty reasoning mixed
  4 GRPO    {steps} steps, {prompts} prompts x {group} answers; reward: right answer, right format
  5 test    {questions} questions on videos never trained on, greedy, after the last step
Everything goes to {out}/"""


def report(run: Run, summary: dict) -> None:
    """The table at the end of a run."""
    g, pct = summary["grpo"], lambda x: f"{100 * x:5.1f} %"
    rows = [
        ("guessing", summary["chance"], ""),
        ("after SFT", summary["sft"]["accuracy"], ""),
        ("  control: SFT forced into the careful style", summary["control"]["accuracy"], ""),
        ("after GRPO", g["accuracy"], ""),
        *((f"  {name}", value, "") for name, value in g["by_category"].items()),
        *((f"  {n} frames", value, "") for n, value in g["by_frames"].items()),
        ("  other environment", g["other_environment"], ""),
        ("  control: wrong video", g["wrong_video"], "should be near guessing"),
    ]
    run.say(f"\naccuracy on {summary['questions']} held-out questions, seed {summary['seed']}")
    for name, value, note in rows:
        run.say(f"  {name:46s} {pct(value)}  {note}")
    run.say("seconds  " + "  ".join(f"{k} {v:.0f}" for k, v in summary["seconds"].items()))
    run.say(
        f"\nLook at {run.out}/curves.png and frames.png, read what it samples in samples.jsonl, ask\n"
        f"again with: python eval.py --model {run.out}/model\nthen read mrsp.py and grpo.py."
    )


def main(argv=None) -> dict:
    try:
        preset = parse_options(sys.argv[1:] if argv is None else argv)
        run = Run(preset)
        toy, config = preset.toy, preset.grpo
        run.say(
            PLAN.format(
                world=run.world,
                device=run.device,
                out=run.out,
                minutes=6 if run.world > 1 else 10,
                videos=toy.base + toy.sft + toy.rl + toy.test + toy.other,
                steps=config.steps,
                prompts=config.prompts,
                group=config.group,
                questions=5 * toy.test,
            )  # fmt: skip
        )
        summary = toy_pipeline(run)
    except (DataError, ModelError) as error:
        sys.exit(f"error: {error}")
    summary["seconds"] = run.seconds | {"total": time.time() - run.started}
    if run.rank == 0:
        (run.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
        evaluation.plot_curves(run.out / "metrics.jsonl", run.out / "curves.png")
        evaluation.plot_frames(summary, run.out / "frames.png")
        report(run, summary)
    run.close()
    return summary


if __name__ == "__main__":
    main()
