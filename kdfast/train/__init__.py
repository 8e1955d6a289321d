"""Training, thin on top of accelerate: `Distiller`, its checkpoints, curves and captured features (docs/training.md)."""

try:
    import accelerate  # noqa: F401
    import matplotlib  # noqa: F401
    import rich  # noqa: F401
    import safetensors  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"kdfast.train needs the 'train' extra ({error}): pip install 'kdfast[train]'. Losses and ops work without it."
    ) from error

from kdfast.train.capture import capture_outputs
from kdfast.train.distiller import Distiller
from kdfast.train.history import History
from kdfast.train.transfer import transfer

__all__ = ["Distiller", "History", "capture_outputs", "transfer"]
