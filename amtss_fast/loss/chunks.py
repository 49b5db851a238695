"""How the rows of a call are cut into chunks, and which rows of each teacher are in a chunk."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class TaughtRows(NamedTuple):
    """The rows that one teacher teaches, those that are left out of the call at the end."""

    places: Tensor
    """[m] int64, ascending: where they are among the rows that are kept; the number of these for a row left out."""
    sources: Tensor
    """[m] int64: where they are in the teacher's own tensors."""


class Chunk(NamedTuple):
    """Some of the rows that are kept."""

    pick: slice | Tensor
    """Where they are in the call's tensors of N rows."""
    n_rows: int
    sources: list[slice | Tensor]
    """For each teacher, where the rows that it teaches are in its own tensors."""
    taught: list[Tensor | None]
    """For each teacher, where the rows that it teaches are in the chunk, [m] int64 ascending; None: all of them."""

    def n_taught(self, k: int) -> int:
        """How many rows teacher `k` teaches."""
        rows = self.taught[k]
        return self.n_rows if rows is None else len(rows)


def taught_rows(
    own: Tensor | None, teaches: Tensor | None, kept: Tensor | None, n_kept: int, n_rows: int
) -> TaughtRows | None:
    """The rows of a teacher whose tensors are of the rows `own`, and that teaches where `teaches` [N] is true.

    None stands for all rows, in `kept` too: the rows [n_kept] that are not ignored. Does not wait for an accelerator.
    """
    if own is not None:
        places = own
    elif teaches is not None:
        places = torch.arange(n_rows, device=teaches.device)
    else:
        return None
    left_out = None if teaches is None else ~teaches[places]
    if kept is not None:
        place_of_row = torch.full((n_rows,), n_kept, device=places.device)
        place_of_row[kept] = torch.arange(n_kept, device=places.device)
        places = place_of_row[places]
    if left_out is not None:
        places = places.masked_fill(left_out, n_kept)
    return TaughtRows(*places.sort(stable=True))


def side_by_side(
    kept: Tensor | None, n_kept: int, teachers: Sequence[TaughtRows | None]
) -> tuple[Tensor | None, list[TaughtRows | None]]:
    """The rows that are kept in another order, that of the first of their teachers, and where these teach then.

    Each chunk then has rows of few teachers, and a product of a teacher's head has many rows.
    """
    some = [(k, own) for k, own in enumerate(teachers) if own is not None]
    if not some:
        return kept, list(teachers)
    device = some[0][1].places.device
    first = torch.full((n_kept + 1,), len(teachers), device=device)
    for k, own in reversed(some):
        first[own.places] = k
    order = first[:n_kept].argsort(stable=True)
    new_place = torch.full((n_kept + 1,), n_kept, device=device)
    new_place[order] = torch.arange(n_kept, device=device)

    def moved(own: TaughtRows) -> TaughtRows:
        places, by_place = new_place[own.places].sort(stable=True)
        return TaughtRows(places, own.sources[by_place])

    return order if kept is None else kept[order], [None if own is None else moved(own) for own in teachers]


def cut(
    kept: Tensor | None,
    n_kept: int,
    teachers: Sequence[TaughtRows | None],
    has_logits: Sequence[bool],
    chunk_rows: Callable[[int], int],
) -> list[Chunk]:
    """Chunks of `chunk_rows(k)` rows, where a row has up to k teachers whose logits are made (`has_logits`).

    Waits for an accelerator once where a teacher has rows of its own, to learn how many of them are in each chunk.
    """
    lists = [teacher.places for teacher in teachers if teacher is not None]
    places = iter(torch.cat(lists).cpu().split([len(own) for own in lists]) if lists else ())
    # On the host from here on.
    own_places = [None if teacher is None else next(places) for teacher in teachers]
    length = chunk_rows(_most_teachers(own_places, has_logits, n_kept))
    edges = [*range(0, n_kept, length), n_kept]
    begins = [None if own is None else torch.searchsorted(own, torch.tensor(edges)).tolist() for own in own_places]

    chunks = []
    for i, (begin, end) in enumerate(itertools.pairwise(edges)):
        pick = slice(begin, end) if kept is None else kept[begin:end]
        chunk = Chunk(pick, end - begin, [pick] * len(teachers), [None] * len(teachers))
        for k, (teacher, first) in enumerate(zip(teachers, begins, strict=True)):
            if teacher is not None and first is not None:
                here = slice(first[i], first[i + 1])
                chunk.sources[k], chunk.taught[k] = teacher.sources[here], teacher.places[here] - begin
        chunks.append(chunk)
    return chunks


def _most_teachers(own_places: Sequence[Tensor | None], has_logits: Sequence[bool], n_kept: int) -> int:
    """The largest number of teachers of a row, of those whose logits are made."""
    everywhere, count = 0, torch.zeros(n_kept + 1, dtype=torch.int64)
    for places, has in zip(own_places, has_logits, strict=True):
        if has and places is None:
            everywhere += 1
        elif has:
            count[places] += 1
    return everywhere + (int(count[:n_kept].max()) if n_kept > 0 else 0)
