"""Sequences into rows of one length, first fit with the longest first. It knows neither text nor models."""

from __future__ import annotations

from collections.abc import Sequence


def pack(sizes: Sequence[int], row_tokens: int) -> list[tuple[int, int, int]]:
    """Place every size in a row of `row_tokens`: [(row, start, segment id from 1)], in the order of `sizes`.

    With items of at most w tokens no row holds fewer than floor(row_tokens / w) of them before another is opened,
    which bounds the number of rows.

    Raises:
        ValueError: an item is longer than a row.
    """
    places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(sizes)
    used: list[int] = []
    count: list[int] = []
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if sizes[item] > row_tokens:
            raise ValueError(f"a sequence of {sizes[item]} tokens does not fit a row of {row_tokens}")
        row = next((r for r, tokens in enumerate(used) if tokens + sizes[item] <= row_tokens), len(used))
        if row == len(used):
            used.append(0)
            count.append(0)
        count[row] += 1
        places[item] = (row, used[row], count[row])
        used[row] += sizes[item]
    return places
