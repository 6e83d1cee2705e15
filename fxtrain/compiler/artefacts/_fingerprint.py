"""The fingerprint of an environment: the facts on which compiled code depends besides its graph."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from fxtrain._torch_internals.inductor import changed_settings

_CPU_INFO = Path("/proc/cpuinfo")

# Flags of the kernel for instructions that a compiler may use. Others describe the system, such as mitigations.
_INSTRUCTIONS = re.compile(
    r"(3dnow|abm|adx|aes|amx|avx|bmi|cldemote|clflush|clwb|clzero|cx16|f16c|fma|fsgsbase|gfni|lahf|lwp|lzcnt|mmx|movbe"
    r"|movdir|mwaitx|pclmul|pku|popcnt|prefetch|ptwrite|rdpid|rdrand|rdrnd|rdseed|serialize|sha|sse|ssse|tbm|vaes"
    r"|vpclmul|waitpkg|wbnoinvd|xop|xsave)"
)

# Variables that change generated code. Paths, and the numbers of workers, do not.
_VARIABLES = ("ATEN_CPU_CAPABILITY", "CPATH", "CXX", "TORCH_COMPILE_", "TORCHINDUCTOR_", "TRITON_")
_IRRELEVANT_VARIABLES = re.compile(
    r".*(CACHE_DIR|COMPILE_THREADS|WORKER_START|DEBUG|LOGS|JOB_ID|_CACHE|PROGRESS|WORKER_SUPPRESS.*)$"
)


def environment_facts(devices: Iterable[torch.device]) -> dict[str, str]:
    """Returns the facts by name, as text.

    Args:
        devices: The devices of the tensors in a graph.
    """
    variables = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith(_VARIABLES) and not _IRRELEVANT_VARIABLES.match(name)
    }
    numerics = {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "oneDNN": torch.backends.mkldnn.enabled,
    }
    return {
        "torch": torch.__version__,
        "fxtrain's compiler": _source_digest(),
        "Python": f"{sys.implementation.cache_tag}{getattr(sys, 'abiflags', '')}",
        "platform": f"{sys.platform} {platform.machine()}",
        "C library": " ".join(platform.libc_ver()),
        "processor features": _processor_features(),
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": str(torch.get_num_threads()),
        "devices": " ".join(sorted({_device_name(device) for device in devices})),
        "numerics": _pairs(numerics),
        "Inductor's settings": _pairs(changed_settings() or {}),
        "environment variables": _pairs(variables),
    }


def differences(here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Describes how the facts of a file differ from those of this process, with both values of each."""
    found = [
        _difference(name, here.get(name, "unknown"), there.get(name, "unknown"))
        for name in sorted({*here, *there}, key=[*here, *there].index)
        if here.get(name) != there.get(name)
    ]
    return ", ".join(found)


def digest(facts: Mapping[str, str]) -> str:
    """Returns a short hash of facts."""
    return hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()[:16]


def _difference(name: str, here: str, there: str) -> str:
    if name != "processor features" or "unknown" in (here, there):
        return f"{name}: {here or 'none'} here, {there or 'none'} there"
    mine, theirs = set(here.split()), set(there.split())
    return f"{name}: {_named(mine - theirs)} only here, {_named(theirs - mine)} only there"


def _named(names: set[str]) -> str:
    return " ".join(sorted(names)) or "none"


def _pairs(values: Mapping[str, object]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _device_name(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} ({properties.major}.{properties.minor}, CUDA {torch.version.cuda or torch.version.hip})"


@functools.cache
def _processor_features() -> str:
    """Returns the instruction sets of the processor. Kernels are compiled for all of them (``-march=native``)."""
    try:
        lines = _CPU_INFO.read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), [])
    if platform.machine() in ("x86_64", "AMD64", "i686"):
        flags = [flag for flag in flags if _INSTRUCTIONS.match(flag)]
    return " ".join(sorted(set(flags)))


@functools.cache
def _source_digest() -> str:
    """Returns a hash of the compiler's source, because the same graph may be compiled differently by another one."""
    root = Path(__file__).parents[1]
    found = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *(root.parent / "_torch_internals").glob("*.py")]):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:12]
