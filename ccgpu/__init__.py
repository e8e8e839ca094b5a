"""Criss-cross attention as a kernel-first library: `ccgpu.cca(q, k, v)`, and CCNet on top of it."""

from pathlib import Path as _Path

# A checkout keeps kernels/, models/ and train/ beside this folder (a wheel holds them inside it): make them importable
# as ccgpu.kernels, ccgpu.models and ccgpu.train from there too, with nothing installed.
_CHECKOUT = _Path(__file__).resolve().parent.parent
if (_CHECKOUT / "setup.cfg").is_file() and (_CHECKOUT / "kernels" / "reference.py").is_file():
    __path__.append(str(_CHECKOUT))

from ccgpu.dispatch import backends  # noqa: E402
from ccgpu.ops import cca  # noqa: E402
from ccgpu.stages import affinity, aggregate  # noqa: E402
from ccgpu.version import __version__  # noqa: E402

__all__ = ["__version__", "affinity", "aggregate", "backends", "cca"]
