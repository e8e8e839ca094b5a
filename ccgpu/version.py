"""The version, once: setup.cfg and `ccgpu.__version__` read it here."""

__version__ = "0.1.0"
