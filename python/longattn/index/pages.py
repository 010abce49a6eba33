"""`Pages`: runs of neighbouring rows, scored by a summary of their keys."""

from __future__ import annotations

from typing import ClassVar, Literal

from longattn import _core
from longattn._checks import integer, one_of
from longattn.index._index import Index, check_store
from longattn.kv import KVStore

#: How a page or a cluster may be scored.
UNIT_SCORES = ("mean", "mean_variance", "bounds", "radius")


class Pages(Index):
    """Runs of `page_size` neighbouring rows, read or left as a whole.

    A page's score for a query `q` (times the softmax scale) is one dot product:

    - `"mean"`: the mean logit of the page, `q . mean(k)`. A page that is left unread is weighed by it: its rows
      have the weight `exp(score)` each and the mean of their values. That is too little where logits differ inside
      a page (Jensen).
    - `"mean_variance"`: the mean logit plus a quarter of `sum_d q_d^2 var_d(k)`, the variance its logits would have
      if channels were independent of each other. A half would be right for Gaussian logits; measured on real keys a
      quarter errs less. Twice the bytes.
    - `"bounds"`: `sum_d max(q_d min_d(k), q_d max_d(k))`, at least any logit of the page (Quest). It ranks pages and
      bounds the mass that was missed, and it estimates nothing. Twice the bytes.
    - `"radius"`: `q . mean(k) + |q| max |k - mean(k)|`, another bound.
    - `"landmark"`: the logit of one row of each page. It only ranks.

    A query group picks pages by the mean over its heads of the share of the softmax that a row of the page has,
    until the budget of rows is full; of the last page it takes the first rows. A page that sinks or window cut is
    scored (by means) and weighed by the rest of its rows. Rows of an unfinished page are read exactly.

    Args:
        store: the store to index; it is kept alive.
        page_size: rows of a page.
        score: see above.
        landmark: with `score="landmark"`, the row of each page that scores it; negative counts from its end.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an argument out of range.

    Cost:
        Memory per page and KV head: a row of keys (two for `"mean_variance"` and `"bounds"`) in the store's dtype,
        padded to 16 numbers; a row of values beside it where pages are weighed. Building reads keys and values once
        or twice. A pick reads all of it.

    References:
        J. Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference", 2024,
        arXiv:2406.10774, for `"bounds"`.
    """

    __slots__ = ()

    KIND: ClassVar[str] = "pages"

    def __init__(
        self,
        store: KVStore,
        page_size: int = 16,
        score: Literal["mean", "mean_variance", "bounds", "radius", "landmark"] = "mean",
        *,
        landmark: int = -1,
    ) -> None:
        check_store(store)
        page_size = integer(page_size, "page_size", 1, 2**32 - 1)
        one_of(score, "score", (*UNIT_SCORES, "landmark"))
        landmark = integer(landmark, "landmark", -page_size, page_size - 1)
        self._set(_core.pages(store._handle, page_size, score, landmark % page_size), store)

    @property
    def page_size(self) -> int:
        """Rows of a page."""
        return int(self.parameters["page_size"])

    @property
    def score(self) -> str:
        """How pages are scored."""
        return str(self.parameters["score"])
