"""Fingerprints of rows, by which text for validation is found among the rows that were trained on.

A fingerprint is a hash of WINDOW tokens in a row. Of all windows those are kept whose hash is low enough, about PER_ROW
a row: the same ones wherever the text stands, so it does not matter how documents were shuffled and packed.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from p828.data.batch import PADDING, Batch

WINDOW = 16  # tokens; GPT-3's authors looked for 13 words (arXiv 2005.14165, appendix C)
PER_ROW = 32
SEEN_FROM = 0.5  # of a row's fingerprints, for the row to count as seen
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that powers of it have inverses modulo 2^64
_INVERSE = np.uint64(pow(int(_FACTOR), -1, 2**64))
_MIX = np.uint64(0xFF51AFD7ED558CCD)  # of MurmurHash3's last step


def fingerprints(
    tokens_BS: npt.NDArray[np.int64], is_token_BS: npt.NDArray[np.bool_]
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.uint64]]:
    """The row and the hash of each window that is kept. Windows with padding, which ends a row, are left out."""
    windows = tokens_BS.shape[1] - WINDOW + 1
    if windows < 1:
        return np.empty(0, np.intp), np.empty(0, np.uint64)
    powers_S, inverses_S = (np.full(tokens_BS.shape[1], base, np.uint64) for base in (_FACTOR, _INVERSE))
    for powers in (powers_S, inverses_S):
        powers[0] = 1
        np.multiply.accumulate(powers, out=powers)
    sums_BS = np.cumsum((tokens_BS.astype(np.uint64) + np.uint64(1)) * powers_S, axis=1)
    hashes_BW = sums_BS[:, WINDOW - 1 :].copy()
    hashes_BW[:, 1:] -= sums_BS[:, : windows - 1]
    hashes_BW *= inverses_S[:windows]  # now the same wherever the window stands
    hashes_BW ^= hashes_BW >> np.uint64(33)
    hashes_BW *= _MIX
    hashes_BW ^= hashes_BW >> np.uint64(33)
    is_kept_BW = hashes_BW <= np.uint64((2**64 - 1) // max(windows // PER_ROW, 1))
    rows, places = np.nonzero(is_kept_BW & is_token_BS[:, WINDOW - 1 :])
    return rows, hashes_BW[rows, places]


class SeenRows:
    """How many validation rows were trained on, as far as this process has seen the rows since its start."""

    def __init__(self, validation: Sequence[Batch]) -> None:
        rows, hashes, count = [], [], 0
        for batch in validation:
            found, own = fingerprints(batch.tokens_BS.numpy(), batch.document_ids_BS.numpy() != PADDING)
            rows.append(found + count)
            hashes.append(own)
            count += len(batch.tokens_BS)
        self._hashes, self._which = np.unique(np.concatenate(hashes), return_inverse=True)
        self._rows, self._count = np.concatenate(rows), count
        self.seen: npt.NDArray[np.bool_] = np.zeros(len(self._hashes), bool)
        """Of each distinct fingerprint, whether it was in a row that was trained on."""

    def note(self, batches: Sequence[Batch]) -> None:
        """Take in micro-batches that are trained on."""
        found = [batch.fingerprints for batch in batches if batch.fingerprints is not None]
        if not found or not len(self._hashes):
            return
        hashes = np.concatenate(found)
        places = np.searchsorted(self._hashes, hashes).clip(max=len(self._hashes) - 1)
        self.seen[places[self._hashes[places] == hashes]] = True

    def share(self, seen: npt.NDArray[np.bool_]) -> float | None:
        """The share of rows of which half the fingerprints are seen; None if no row has one.

        `seen` is `self.seen`, or what several processes have seen together.
        """
        windows = np.bincount(self._rows, minlength=self._count)
        of_rows = np.bincount(self._rows, weights=seen[self._which], minlength=self._count)
        has_one = windows > 0
        if not has_one.any():
            return None
        return float((of_rows[has_one] >= SEEN_FROM * windows[has_one]).mean())
