"""kdfast: knowledge distillation with fused kernels. Losses in `kdfast.losses`, ops in `kdfast.ops`, papers in `kdfast.methods`."""

from kdfast import losses, ops
from kdfast._dispatch import backend_info, debug
from kdfast._library import release_memory
from kdfast._version import __version__

__all__ = ["__version__", "backend_info", "debug", "losses", "ops", "release_memory"]
