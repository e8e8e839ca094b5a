"""Criss-cross attention as a kernel-first library: `ccgpu.cca(q, k, v)`, and CCNet on top of it.

The functions are imported when they are first used, so that `import ccgpu`, and with it the command `ccgpu`, does not
wait for torch. torch.ops.ccgpu is registered then too, or by `import ccgpu.ops`.
"""

import importlib as _importlib
from pathlib import Path as _Path
from typing import TYPE_CHECKING

from ccgpu.version import __version__

if TYPE_CHECKING:
    from ccgpu import distributed
    from ccgpu.decomposition import decomposed, decompositions
    from ccgpu.dispatch import backends
    from ccgpu.ops import cca
    from ccgpu.stages import affinity, aggregate

# A checkout keeps kernels/, models/ and train/ beside this folder (a wheel holds them inside it): make them importable
# as ccgpu.kernels, ccgpu.models and ccgpu.train from there too, with nothing installed.
_CHECKOUT = _Path(__file__).resolve().parent.parent
if (_CHECKOUT / "setup.cfg").is_file() and (_CHECKOUT / "kernels" / "reference.py").is_file():
    __path__.append(str(_CHECKOUT))

__all__ = [
    "__version__",
    "affinity",
    "aggregate",
    "backends",
    "cca",
    "decomposed",
    "decompositions",
    "distributed",
]

_HOMES = {  # name -> module
    "affinity": "stages",
    "aggregate": "stages",
    "backends": "dispatch",
    "cca": "ops",
    "decomposed": "decomposition",
    "decompositions": "decomposition",
}


if not TYPE_CHECKING:  # type checkers take the imports above, and with this function would allow any name

    def __getattr__(name: str) -> object:
        if name == "distributed":
            return _importlib.import_module("ccgpu.distributed")
        if name not in _HOMES:
            raise AttributeError(f"module 'ccgpu' has no attribute {name!r}")
        # All at once: they register torch.ops.ccgpu, of which none should be missing after the first use.
        for known, home in _HOMES.items():
            globals()[known] = getattr(_importlib.import_module(f"ccgpu.{home}"), known)
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *_HOMES, "distributed"})
