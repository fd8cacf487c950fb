"""Lets torchvision be imported on a torch for CPUs.

Its wheel is built for CUDA. Without its library, importing it fails where it describes two of that library's operators
to torch, so these are declared first. Nothing in a run calls them.
"""

import importlib.abc
import sys


class _Declare(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch

            if torch.version.cuda is None:
                self.library = torch.library.Library("torchvision", "FRAGMENT")
                self.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                self.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                sys.modules["torchvision_operators"] = self  # type: ignore[assignment]  # keeps the library alive
        return None


sys.meta_path.insert(0, _Declare())
