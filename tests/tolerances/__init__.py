"""How far a result may be from its float64 reference: the one place where tolerances are stated.

Kernels read storage dtypes exactly and compute in float32, whose unit roundoff is `U` (float64 arrays in float64,
where `U_DOUBLE` stands in its place). Rounding errors have
either sign and mostly cancel, so sums are held to what their terms' size allows, not to the worst case:

- A logit is a sum of products that never exceeds `S`, the largest `scale * |q| |k|`, and errs by `U * S`;
  what is added to it, and `exp`, err by `U` of their own size.
- An error `e` of the logits changes softmax weights by a factor within `1 +- 2 e`, hence the output by at
  most `2 e * max |v|`.
- Sums over `n` keys, of weights and of weighted values, err by `sqrt(n) * U` of the result.
- Rounding to the output's dtype comes on top.

`SAFETY` covers what this leaves out.
"""

from tolerances.arithmetic import ROUNDOFF, SAFETY, U_DOUBLE, Tolerance, U, unit
from tolerances.coded import code_error, coded_attention, coded_rows, device_coded_attention, stored
from tolerances.exact import (
    Weights,
    added_branches,
    attention,
    core_context,
    device_attention,
    latent_attention,
    merge,
    projected_attention,
    same_storage,
    sampled,
    selective,
    summarised,
    two_levels,
    weights,
)
from tolerances.gradients import Gradients, attention_backward, check_gradients, perturbed
from tolerances.layers import check_features, check_layer, check_linear, device_recurrence

__all__ = [
    "ROUNDOFF",
    "SAFETY",
    "U_DOUBLE",
    "Gradients",
    "Tolerance",
    "U",
    "Weights",
    "added_branches",
    "attention",
    "attention_backward",
    "check_features",
    "check_gradients",
    "check_layer",
    "check_linear",
    "code_error",
    "coded_attention",
    "coded_rows",
    "core_context",
    "device_attention",
    "device_coded_attention",
    "device_recurrence",
    "latent_attention",
    "merge",
    "perturbed",
    "projected_attention",
    "same_storage",
    "sampled",
    "selective",
    "stored",
    "summarised",
    "two_levels",
    "unit",
    "weights",
]
