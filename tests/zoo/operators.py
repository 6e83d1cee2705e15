"""Imports of packages whose C++ operators are built for another build of torch.

The package index provides torchvision and torchaudio only for CUDA. With a CPU build of torch, their libraries do not
load and their imports raise errors about missing operators, although their models need none of them.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import torch
from torch import Tensor

_LIBRARIES: list[torch.library.Library] = []  # keeps operators alive, because they end with their library


def import_without_operators() -> None:
    """Imports torchvision and torchaudio, if installed, with ``nms`` in Python.

    Packages that use them can be imported afterwards.
    """
    for package, import_package in (("torchvision", _import_torchvision), ("torchaudio", _import_torchaudio)):
        if package not in sys.modules and importlib.util.find_spec(package):
            import_package()


def _import_torchvision() -> None:
    if not torch._C._dispatch_has_kernel("torchvision::nms"):
        _load_torchvision_operators()
    import torchvision

    if _LIBRARIES:
        torchvision.ops.boxes._assert_has_ops = lambda: None


def _import_torchaudio() -> None:
    try:
        import torchaudio as torchaudio
    except OSError:
        extension = types.ModuleType("torchaudio._extension")
        extension.__dict__.update(
            _IS_TORCHAUDIO_EXT_AVAILABLE=False,
            _IS_ALIGN_AVAILABLE=False,
            _check_cuda_version=lambda: None,
            fail_if_no_align=lambda function: function,
        )
        for name in [name for name in sys.modules if name.startswith("torchaudio")]:
            del sys.modules[name]
        sys.modules[extension.__name__] = extension
        import torchaudio as torchaudio


def _load_torchvision_operators() -> None:
    from importlib.metadata import distribution

    try:
        for file in distribution("torchvision").files or ():
            if file.match("torchvision/_C*.so"):
                torch.ops.load_library(str(file.locate()))
                return
    except OSError:
        pass
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.impl("nms", _nms, "CPU")
    _LIBRARIES.append(library)


def _nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Indices of the boxes without a higher-scoring overlapping box, best first."""
    left_top = torch.max(boxes[:, None, :2], boxes[:, :2])
    right_bottom = torch.min(boxes[:, None, 2:], boxes[:, 2:])
    shared = (right_bottom - left_top).clamp(min=0).prod(-1)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    overlaps = (shared / (areas[:, None] + areas - shared) > iou_threshold).tolist()
    kept: list[int] = []
    for index in scores.argsort(descending=True, stable=True).tolist():
        if not any(overlaps[index][other] for other in kept):
            kept.append(index)
    return torch.tensor(kept, dtype=torch.int64, device=boxes.device)
