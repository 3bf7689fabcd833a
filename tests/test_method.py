"""kit/method.py: a Python file in place of names of grpo.py, in training and in evaluation."""

import json
from types import SimpleNamespace

import pytest
import torch
from test_train import CONFIG, FixedEngine, step_of

import data
import grpo
from data import DataError
from families import load
from kit.method import Method
from kit.presets import read_settings

EXAMPLE = SimpleNamespace(id="q1", answer="[2, 6]", options=())
TIOU = '''
import re
from dataclasses import dataclass
import grpo

@dataclass(frozen=True)
class Config(grpo.Config):
    """GRPO with a reward for intervals."""
    least: float = 0.0  # IoU below this earns nothing

def reward(completion, example, config):
    """Temporal IoU of two intervals in seconds, "[2, 6]"."""
    said = re.findall(r"<answer>(.*?)</answer>", completion)
    found = [re.findall(r"[0-9.]+", text) for text in (said[-1] if said else "", example.answer)]
    (a, z), (start, end) = (map(float, x[:2]) if len(x) > 1 else (0, 0) for x in found)
    both = max(0.0, min(z, end) - max(a, start))
    iou = both / max(max(z, end) - min(a, start), 1e-9)
    iou = iou if iou >= config.least else 0.0
    return {"reward": iou, "accuracy": iou, "length_s": z - a}
'''


def write(folder, text: str):
    (folder / "own.py").write_text(text)
    return str(folder / "own.py")


def test_without_a_file_it_is_grpo():
    method, config = Method(), grpo.Config()
    example = SimpleNamespace(id="q", answer="B", options=("x", "y"))
    text = "<think> . </think> <answer> B </answer>"
    assert method.reward(text, example, config) == grpo.reward(text, example, config)
    assert method.Config is grpo.Config


def test_a_file_gives_a_reward_and_options_and_takes_the_rest_from_grpo(tmp_path):
    file = write(tmp_path, TIOU)
    settings, method, _ = read_settings(
        ["--preset", "toy", "--method", file, "--grpo.least", "0.4"]
    )
    assert settings.grpo.least == 0.4 and settings.grpo.steps == 250
    parts = method.reward("<answer>[4, 8]</answer>", EXAMPLE, method.Config())
    assert parts == pytest.approx({"reward": 1 / 3, "accuracy": 1 / 3, "length_s": 4})
    assert method.reward("<answer>[4, 8]</answer>", EXAMPLE, settings.grpo)["reward"] == 0
    rewards = torch.rand(2, 4)
    expected = grpo.advantages(rewards, settings.grpo)
    assert torch.equal(method.advantages(rewards, settings.grpo), expected)


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "no such file"),
        ("x = (", "cannot be imported .SyntaxError"),
        ("import nothing_like_this", "cannot be imported .ModuleNotFoundError"),
        ("x = 1", "defines none of reward, advantages, loss, Config"),
        ("class Config: pass", "Config must be a subclass of grpo.Config"),
    ],
)
def test_a_file_that_is_no_method_is_one_line_that_names_it(text, message, tmp_path):
    file = str(tmp_path / "none.py") if text is None else write(tmp_path, text)
    with pytest.raises(DataError, match=f"{file}.*{message}") as caught:
        Method(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "body, message",
    [
        ("1 / 0", r"reward\(\) failed in line 2: ZeroDivisionError"),
        ("return 1.0", r"reward\(\) must return a dict with reward and accuracy, not 1.0"),
        ("return {'reward': 1.0}", "must return a dict with reward and accuracy"),
        ("return {'reward': float('nan'), 'accuracy': 0}", "reward = nan to question q1"),
        ("return {'reward': 1, 'accuracy': '1'}", "accuracy = '1' to question q1"),
        ("return {'reward': 1, 'accuracy': 1, 'tokens': 1}", "tokens is the name of a metric"),
    ],
)
def test_a_reward_that_fails_is_one_line_that_names_file_and_question(body, message, tmp_path):
    method = Method(write(tmp_path, f"def reward(completion, example, config):\n    {body}\n"))
    with pytest.raises(DataError, match=f"own.py: .*{message}") as caught:
        method.reward("", EXAMPLE, grpo.Config())
    assert "\n" not in str(caught.value)


def test_advantages_and_loss_are_checked_too(tmp_path):
    text = "def advantages(rewards, config):\n    return rewards[:, :1]\n"
    text += (
        "def loss(logp, advantage, mask, config, **more):\n    return logp.sum() * float('nan'), {}"
    )
    method, one = Method(write(tmp_path, text)), torch.ones(1, 2, 1)
    with pytest.raises(DataError, match="own.py: advantages.. must return finite numbers"):
        method.advantages(torch.rand(2, 4), grpo.Config())
    with pytest.raises(DataError, match="own.py: loss.. must return a finite scalar"):
        method.loss(one, one[0].T, one, grpo.Config())


def test_a_step_by_a_method_of_ones_own_logs_all_parts(toy, model, tmp_path):
    """Its reward is trained on; its parts are metrics, as fractions."""
    text = "def reward(completion, example, config):\n"
    text += "    share = len(completion) % 3 / 2\n"
    text += "    return {'reward': share, 'accuracy': share, 'third': 1 / 3}\n"
    rows = data.load_rows(str(toy / "rl.jsonl"))[:3]
    gold = {int(model.prompt(row).ids.sum()): row.answer for row in rows}
    engine = FixedEngine(load(toy / "init"), gold)
    optimizer = torch.optim.SGD(model.policy.parameters(), lr=0.0)
    method = Method(write(tmp_path, text))
    metrics = step_of(model, model, engine, optimizer, rows, 0, CONFIG, method=method)
    assert metrics["third"] == pytest.approx(1 / 3) and "format" not in metrics
    assert metrics["reward"] == metrics["accuracy"]


@pytest.mark.slow
def test_a_run_by_a_method_shows_its_parts_in_samples_answers_and_report(tmp_path):
    from test_train import SMALLEST

    import train

    file = write(
        tmp_path,
        "def reward(completion, example, config):\n"
        "    return {'reward': 0.5, 'accuracy': 0.5, 'cited': 0.25}\n",
    )
    out = tmp_path / "out"
    summary = train.main([*SMALLEST, "--method", file, "--output_dir", str(out), "--eval.frames"])
    assert summary["grpo"]["accuracy"] == 0.5
    sample = json.loads((out / "samples.jsonl").open().readline())
    assert sample["responses"][0]["cited"] == 0.25
    answers = [json.loads(line) for line in (out / "answers_after.jsonl").open()]
    assert all(a["parts"]["cited"] == 0.25 and a["accuracy"] == 0.5 for a in answers)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [x["cited"] for x in lines if x["stage"] == "grpo"] == [0.25, 0.25]
    assert "cited" in (out / "report.html").read_text()
