"""What sequences share that cannot take back a row once it was attended to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

if TYPE_CHECKING:
    import torch


class OnwardSequence:
    """Keeps new rows until they are attended to; counts the tokens."""

    #: What a copy is refused with.
    REFUSAL: ClassVar[str]

    def __init__(self) -> None:
        self._new: tuple[torch.Tensor, torch.Tensor] | None = None
        self._arrived = 0

    def __len__(self) -> int:
        """Tokens of this sequence, those included that were dropped since."""
        return self._arrived

    def drop_old_rows(self) -> None:
        """Nothing to do: `attend` drops rows."""

    def append(self, k: torch.Tensor, v: torch.Tensor) -> None:
        """Takes new rows `[Hkv, L, D]`, which `attend` stores."""
        self._new = k, v
        self._arrived += k.shape[1]

    def can_crop(self, rows: int) -> bool:
        """Whether nothing is to go: what was dropped for a row does not come back with it."""
        return rows == 0

    def crop(self, rows: int) -> None:
        """Gives back the rows that were not attended to yet."""
        if rows:
            self._new, self._arrived = None, self._arrived - rows

    def fork(self) -> NoReturn:
        """Refuses.

        Raises:
            ValueError: always.
        """
        raise ValueError(self.REFUSAL)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        self.fork()
