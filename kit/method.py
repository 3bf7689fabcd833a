"""The method of a run: grpo.py, or a Python file that puts some of its names in their place.

    --method tiou.py          def reward(completion, example, config): ...       from that file
                              advantages, loss, Config                           from grpo.py

One mechanism for a reward of one's own, for the algorithm family and for published variants. What
the file gives is checked where it is called: an error is one line that names the file.

Check this file alone:  pytest tests/test_method.py
"""

import importlib.util
import math
import traceback
from pathlib import Path

import grpo
from data import DataError
from kit.run import METRICS

NAMES = ("reward", "advantages", "loss", "Config")
NEEDED = ("reward", "accuracy")  # of the parts that a reward returns
PARTS = (*NEEDED, "format")  # those that METRICS explains


class Method:
    """reward, advantages, loss and Config of a file; default: grpo.py's. Raises DataError."""

    def __init__(self, file: str | None = None):
        self.file = file or "grpo.py"
        module = grpo if file is None else load_file(file)
        found = {name: getattr(module, name) for name in NAMES if hasattr(module, name)}
        if not found:
            raise DataError(f"--method {file}: defines none of {', '.join(NAMES)}")
        self.names = {name: getattr(grpo, name) for name in NAMES} | found
        self.Config = self.names["Config"]
        if not (isinstance(self.Config, type) and issubclass(self.Config, grpo.Config)):
            raise DataError(f"--method {file}: Config must be a subclass of grpo.Config")
        self.config = self.Config()  # a training run puts its own in place

    def call(self, name: str, *given, **more):
        """What the file's function returns; what it raises becomes a DataError."""
        try:
            return self.names[name](*given, **more)
        except Exception as error:
            line = traceback.extract_tb(error.__traceback__)[-1].lineno
            what = f"{type(error).__name__}: {error}"
            raise DataError(f"{self.file}: {name}() failed in line {line}: {what}") from error

    def reward(self, completion: str, example, config) -> dict[str, float]:
        """The parts of an answer's reward, "reward" and "accuracy" among them, all finite."""
        parts = self.call("reward", completion, example, config)
        if not isinstance(parts, dict) or not all(name in parts for name in NEEDED):
            raise DataError(
                f"{self.file}: reward() must return a dict with reward and accuracy, not {parts!r}"
            )
        for name, value in parts.items():
            if name in METRICS and name not in PARTS:
                raise DataError(f"{self.file}: {name} is the name of a metric: call it otherwise")
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise DataError(
                    f"{self.file}: reward() gives {name} = {value!r} to question {example.id}: "
                    "every part must be a finite number"
                )
        return {name: float(value) for name, value in parts.items()}

    def advantages(self, rewards, config):
        """(B, G) -> (B, G), finite."""
        found = self.call("advantages", rewards, config)
        if found.shape != rewards.shape or not found.isfinite().all():
            raise DataError(f"{self.file}: advantages() must return finite numbers, one an answer")
        return found

    def loss(self, logp, advantage, mask, config, **more):
        """A scalar, and tensors to log, of mask's shape."""
        total, seen = self.call("loss", logp, advantage, mask, config, **more)
        if self.names["loss"] is not grpo.loss and (total.ndim or not total.isfinite()):
            raise DataError(f"{self.file}: loss() must return a finite scalar, not {total}")
        return total, seen


def load_file(file: str):
    """A Python file as a module, or a DataError."""
    if not Path(file).is_file():
        raise DataError(f"--method {file}: no such file")
    try:
        spec = importlib.util.spec_from_file_location(f"method_{Path(file).stem}", file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise DataError(f"--method {file}: cannot be imported ({what})") from error
    return module
