"""Files can be copied: each works alone, or with the siblings that its opening names."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import zoo

ROOT = Path(__file__).resolve().parents[1]

GRPO = """
import torch
from types import SimpleNamespace
import grpo

config = grpo.Config(group=4, kl_coef=0.0)
question = SimpleNamespace(answer="B", options=("red", "blue"))
texts = [f"<think> hm </think> <answer> {x} </answer>" for x in "ABBC"]
rewards = torch.tensor([[grpo.reward(text, question, config)["reward"] for text in texts]])
advantage = grpo.advantages(rewards, config)  # (B, G)
logp = torch.zeros(1, 4, 3, requires_grad=True)  # (B, G, R), of the policy
loss, seen = grpo.loss(logp, advantage, torch.ones(1, 4, 3), config, total_tokens=12)
loss.backward()
assert logp.grad.sign()[0, :, 0].tolist() == [1, -1, -1, 1]  # what was right gets likelier
"""

# Prompt and answers in one sequence, through an unmodified model.
MRSP = """
import torch
from types import SimpleNamespace
from transformers import AttentionInterface, Qwen2Config, Qwen2ForCausalLM
import mrsp

AttentionInterface.register("mrsp", mrsp.mrsp_attention)
torch.manual_seed(0)
config = Qwen2Config(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3)
lm = Qwen2ForCausalLM(config).eval()
ids = torch.randint(50, (9,))
prompt = SimpleNamespace(ids=ids, positions=torch.arange(9), media=None, media_at=torch.arange(0))
answers = [torch.randint(50, (r,)) for r in (4, 1, 6)]

expected = []  # each answer behind a prompt of its own
for answer in answers:
    logp = lm(torch.cat([ids, answer])[None]).logits[0, 8:-1].log_softmax(-1)
    expected.append(logp.gather(-1, answer[:, None])[:, 0])

lm.set_attn_implementation("mrsp")
pack = mrsp.pack([prompt], [answers])
out = lm(pack.ids, position_ids=pack.positions, use_cache=False, mrsp=pack.layout)
logp = out.logits.flatten(0, 1)[pack.hidden_at].log_softmax(-1)
found = logp.gather(-1, pack.targets[:, None])[:, 0]
assert pack.ids.shape == (1, 9 + 4 + 1 + 6)
assert torch.allclose(found, torch.cat(expected), atol=1e-5)
"""

ROLLOUT = """
import torch
from types import SimpleNamespace
from transformers import AttentionInterface, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from mrsp import mrsp_attention
from rollout import Sampling, TorchEngine

class Model(torch.nn.Module):
    media_tokens, media_width, sharded = (), 0, False
    def __init__(self, llm, tokenizer):
        super().__init__()
        self.policy, self.tokenizer, self.ends = llm, tokenizer, {tokenizer.eos_token_id}
        llm.inputs = self.inputs
    def inputs(self, ids, media=None, media_at=None):
        return {"inputs_embeds": self.policy.get_input_embeddings()(ids)}

AttentionInterface.register("mrsp", mrsp_attention)
tokenizer = PreTrainedTokenizerFast.from_pretrained(".")
llm = Qwen2ForCausalLM(Qwen2Config.from_pretrained(".", attn_implementation="mrsp"))
ids = torch.tensor(tokenizer("Which came first?").input_ids)
prompt = SimpleNamespace(ids=ids, positions=torch.arange(len(ids)), media=None, media_at=ids[:0])
(answers,) = TorchEngine(Model(llm, tokenizer)).generate([prompt], 3, Sampling(0.7, max_tokens=5))
"""
SAMPLED = """
llm.set_attn_implementation("sdpa")
for answer in answers:
    with torch.no_grad():
        logits = llm(torch.cat([ids, answer.ids])[None]).logits[0, len(ids) - 1 : -1] / 0.7
    expected = logits.log_softmax(-1).gather(-1, answer.ids[:, None])[:, 0]
    assert torch.allclose(answer.logps, expected, atol=1e-4) and 1 <= len(expected) <= 5
"""

SFT = """
import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from data import Example
from model import MultiModal
from sft import SFTConfig, train

class Text(MultiModal):
    def __init__(self, llm, tokenizer):
        super().__init__(llm, torch.nn.Module(), tokenizer, {})
        self.projector = torch.nn.Module()

torch.manual_seed(0)
llm = Qwen2ForCausalLM(Qwen2Config.from_pretrained("."))
model = Text(llm, PreTrainedTokenizerFast.from_pretrained("."))
rows = [Example(str(i), f"What is {i} + 1?", (), "", "", (), "text", f"{i + 1}") for i in range(6)]
seen = []
config = SFTConfig(steps=2, groups=2, texts=3, train="llm", lr=1e-2, warmup=0.0)
train(model, rows, config, log=lambda step, metrics: seen.append(metrics["loss"]))
assert len(seen) == 2 and seen[1] < seen[0], seen
"""

SCRIPTS = {  # by the files that are copied
    "grpo": GRPO,
    "mrsp": MRSP,
    "rollout mrsp": ROLLOUT + SAMPLED,
    "sft mrsp data model": SFT,
}
SLOW = [pytest.param(files, marks=pytest.mark.slow) for files in list(SCRIPTS)[1:]]


@pytest.mark.parametrize("files", ["grpo", *SLOW])
def test_copied_into_an_empty_folder_it_works(files, tmp_path):
    for name in files.split():
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    model = zoo.build("qwen2")  # the scripts read its tokenizer and config
    model.tokenizer.save_pretrained(tmp_path)
    model.policy.config.save_pretrained(tmp_path)
    (tmp_path / "script.py").write_text(SCRIPTS[files])
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_policy_of_ones_own_takes_twenty_lines():
    assert len([line for line in ROLLOUT.splitlines() if line]) <= 20


@pytest.mark.parametrize("files", SCRIPTS)
def test_an_opening_names_the_siblings_that_a_copy_needs(files):
    name, *siblings = files.split()
    opening = (ROOT / f"{name}.py").read_text().split('"""')[1].replace("\n", " ")
    after = opening[opening.index("Copied") :]
    assert all(f"{sibling}.py" in after[:90] for sibling in siblings), after[:90]
