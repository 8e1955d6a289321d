"""The ops. Each file holds the equation, the plain-torch reference, the registration and the public function."""

from kdfast.ops.divergence import divergence, divergence_reference

__all__ = ["divergence", "divergence_reference"]
