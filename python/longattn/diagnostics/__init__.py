"""What tells whether vectors suit an index: measured in float64 numpy, for studies, not for a decoding loop."""

from longattn.diagnostics.out_of_distribution import mahalanobis

__all__ = ["mahalanobis"]
