"""Loads the compiled libraries once, records why one is missing, and lists which implementation serves each op on each
device.

Four implementations can serve an op: "c++" (csrc/cpu) and "cuda" (csrc/cuda), which register themselves when their
library is loaded; "triton", which is registered from Python with `register`; and "reference", plain torch, where there
is no other.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import torch

from deftx_kernels.ops import schemas

NO_KERNEL = "no kernel for this op"
DEVICES = ("cpu", "cuda")
_COMPILED = {"cpu": "c++", "cuda": "cuda"}  # device -> the implementation that its compiled library holds
_FOLDER = Path(__file__).parents[1]
_SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")

errors: dict[str, str] = {}  # device -> why its compiled library is not loaded
_loaded = False
_registered: dict[tuple[str, str], str] = {}  # (op, device) -> implementation, for those registered from Python
_absent: dict[str, str] = {}  # implementation -> why it serves nothing here

# Of sm_80, the oldest architecture that CMakeLists.txt compiles for; Triton's bfloat16 products need it, too.
LEAST_CAPABILITY = (8, 0)
# Above it, denoise/decompositions.py uses torch.linalg on a GPU: our kernels use one multiprocessor for each matrix.
MAX_EIGH_ROWS = 1024
# (op, implementation) -> condition -> what runs instead. The conditions are decided in denoise/decompositions.py,
# registrations.py, csrc/cpu/masked_linear_grad.cpp and kernels/product_strips.py.
LIMITS: dict[tuple[str, str], dict[str, str]] = {
    ("eigh", "cuda"): {f"more than {MAX_EIGH_ROWS} rows": "torch.linalg"},
    ("eigvalsh", "cuda"): {f"more than {MAX_EIGH_ROWS} rows": "torch.linalg"},
    ("residual_cut", "triton"): {"float64": "reference"},
    ("low_rank_denoised", "triton"): {"float64": "reference"},
    ("masked_linear_grad", "c++"): {"density above 0.2": "torch.matmul"},
    ("masked_linear_grad", "triton"): {
        "2048 tokens (float32 without TF32: 256, float64: 512), several waves of tiles, density 1/1024": "torch.mm",
    },
}


class Backend(NamedTuple):
    """Which implementation serves an op on a device."""

    name: str  # "c++", "cuda", "triton", "reference"; "none" where nothing does
    others: dict[str, str]  # every other implementation there is for this device -> why it does not serve
    limits: dict[str, str]  # condition -> what serves the op instead where it holds


def register(op: str, device: str, name: str) -> None:
    """Record that the implementation `name` has registered a kernel of `op` for `device` from Python."""
    if op not in schemas.SCHEMAS or device not in DEVICES:
        raise ValueError(
            f"no op {op!r} on device {device!r}: ops are {', '.join(schemas.SCHEMAS)}; devices are {', '.join(DEVICES)}"
        )
    _registered[op, device] = name


def absent(name: str, reason: str) -> None:
    """Record why no kernel of an implementation, such as "triton", is registered."""
    _absent[name] = reason


def build_info() -> dict:
    """What the build wrote: `built`, `reason`, `compiler` of "cpu" and "cuda"; `torch`. Empty if nothing was built."""
    try:
        return json.loads((_FOLDER / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {}


def _load(device: str) -> str | None:
    """Loads one library. Returns why it could not be, or None."""
    if device == "cuda" and not torch.version.cuda:
        return "not loaded: this torch has no CUDA"
    info = build_info()
    path = _FOLDER / f"libdeftx_{device}{_SUFFIX}"
    if not path.exists():
        if not info:
            return "not built: the package runs from a source tree that was never installed"
        reason = info.get(device, {}).get("reason")
        return f"not built: {reason or f'{path.name} is missing from the installed package'}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        detail = str(error.__cause__ or error).replace(str(_FOLDER), "...")
        compiler = info.get(device, {}).get("compiler", "an unknown compiler")
        built = f"built with {compiler} against torch {info.get('torch', 'unknown')}; this is torch {torch.__version__}"
        return f"failed to load: {detail} ({built})"
    return None


def load() -> None:
    """Load the compiled libraries, once; warn about each one that is missing although its device is here."""
    global _loaded
    if _loaded:
        return
    _loaded = True
    for device in DEVICES:
        reason = _load(device)
        if reason is None:
            continue
        errors[device] = reason
        # Counting GPUs does not initialise CUDA, so that forks still work.
        if device == "cpu" or (torch.version.cuda and torch.cuda.device_count() > 0):
            tool = "nvcc" if device == "cuda" else "a C++ compiler"
            warnings.warn(
                f"deftx_kernels: the {device} library is missing ({reason}). Its ops run on slower implementations, "
                f"which deftx_kernels.backends() lists. To build it, reinstall where {tool} is present:"
                " pip install --no-build-isolation --no-deps --force-reinstall deftx-kernels, or -e . in a source tree",
                RuntimeWarning,
                stacklevel=2,
            )


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{schemas.NAMESPACE}::{op}", key)


def _too_old() -> str | None:
    """Why the kernels for GPUs cannot run on one of this machine's, or None. Initialises CUDA where there is one."""
    if not torch.version.cuda or torch.cuda.device_count() == 0:
        return None
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < LEAST_CAPABILITY:
            least, this = (".".join(map(str, x)) for x in (LEAST_CAPABILITY, capability))
            name = torch.cuda.get_device_name(index)
            return f"needs compute capability {least} or newer: cuda:{index} ({name}) has {this}"
    return None


def _serving(op: str, device: str) -> str:
    """What the dispatcher would run."""
    if _has_kernel(op, device.upper()):
        return _registered.get((op, device), _COMPILED[device])
    if _has_kernel(op, "CompositeExplicitAutograd"):
        return "reference"
    return "none"


def _why_not(op: str, device: str, name: str, serving: str) -> str:
    if name == "reference":
        return f"{serving} takes precedence" if _has_kernel(op, "CompositeExplicitAutograd") else "not registered"
    if name == _COMPILED[device] and device in errors:
        return errors[device]
    if name == _COMPILED[device] and not _loaded:
        return "not loaded: deftx_kernels.ops.library.load() has not run"
    return _absent.get(name, NO_KERNEL)


def backends() -> dict[str, dict[str, Backend]]:
    """Which implementation serves each op on each device, and why the others do not.

    Read from the dispatcher, so it is what a call would run. Devices are listed whether or not this machine has them;
    where it has a GPU that is too old for the kernels, nothing serves an op that has one.

    Returns:
        Op → device → `Backend`: `name`, `others` (implementation → why it does not serve) and `limits` (condition →
        what serves instead of `name` where the condition holds).

    Example:
        >>> import deftx_kernels
        >>> served = deftx_kernels.backends()["csr_gather"]["cpu"]
        >>> sorted([served.name, *served.others])
        ['c++', 'reference']
        >>> deftx_kernels.backends()["csr_gather"]["cuda"].limits
        {}
    """
    result: dict[str, dict[str, Backend]] = {}
    too_old = _too_old()
    for op in schemas.SCHEMAS:
        result[op] = {}
        for device in DEVICES:
            serving = _serving(op, device)
            gated = serving if device == "cuda" and too_old and serving in ("cuda", "triton") else None
            names = [_COMPILED[device], *(["triton"] if device == "cuda" else []), "reference"]
            others = {name: _why_not(op, device, name, serving) for name in names if name != serving}
            if gated:  # the dispatcher would run it, and its launch would fail
                serving, others = "none", {**others, gated: str(too_old)}
            result[op][device] = Backend(serving, others, dict(LIMITS.get((op, serving), {})))
    return result
