"""The adaptive strategy: the importance of each teacher in each language, and the weight of each language.

Running means over training, per teacher k and language l, from the margins m[k, n] of each row that
:func:`amtss_fast.amtss_loss` returns anyway: M[k, l], the teacher's margin, S[l], the student's, and A[k, l], the
teacher's share of the rows::

    share of a row       a[k, n] = softmax over k of log alpha[k, l] + m[k, n] / importance_temperature
    teacher importance   alpha[k, l] = max(floor, A[k, l]), normalized
    gap                  G[l] = max(0, sum_k alpha[k, l] M[k, l] - S[l])
    language weight      r[l] ∝ exp(G[l] / gap_temperature), clipped to [1 / max_weight, max_weight]

This is expectation maximisation for the weights of a mixture, a row's evidence for a teacher being
exp(m / importance_temperature): with `weighting="label_nll"` and temperature 1 alpha maximises the likelihood that the
mixture sum_k alpha[k, l] p_k gives the labels (Dempster, Laird & Rubin 1977; stacked generalisation, Wolpert 1992).
The importance of a teacher comes from the rows in which it is better than the others, not from its mean margin: two
teachers that know half of the classes each both keep a high importance. A starts from one row of equal shares per
language.

r averages 1 over the rows seen so far, not over each batch, so that gradient accumulation and several processes are
exact. The loss takes alpha as `teacher_prior` and r as `sample_weight`.

Source: AMTSS (arXiv 2305.07928) names an adaptive learning strategy and teacher importance weights; its abstract fixes
no formula, and their use here is this library's own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch import distributed as dist

from amtss_fast.loss.checks import values_are_free
from amtss_fast.loss.contract import AMTSSStats

# exp(-30) is negligible in float32; a log-probability of -inf is replaced by this.
_LEAST_MARGIN = -30.0
# Rows of equal shares that are added to those seen, so that no data gives uniform importance.
_EQUAL_ROWS = 1.0
# Larger bounds than this, which float32 holds, have no effect.
_UNBOUNDED = 1e30
# Quotients by smaller temperatures would be infinite.
_LEAST_TEMPERATURE = 1e-18
# Steps of expectation maximisation over held-out rows.
_START_STEPS = 50


class AdaptiveStrategy:
    """Teacher importance and language weights of one training; the formulas head this module.

    >>> adaptive = AdaptiveStrategy(n_teachers=3, n_languages=15, importance_temperature=0.1)
    >>> prior = adaptive.teacher_prior(language_ids)
    >>> loss, stats = amtss_loss(s, t, labels, teacher_prior=prior, return_stats=True)
    >>> adaptive.update(stats, language_ids, row_mask=labels >= 0)
    >>> adaptive.step()  # after each optimizer step

    Args:
        n_teachers: K.
        n_languages: L; `language_ids` are in [0, L).
        importance_temperature: >= 1e-18; small values favor the best teacher of each row, inf is uniform. None: off,
            importance exactly 1.
        gap_temperature: >= 1e-18; small values favor the languages that lag behind, inf is uniform. None: off,
            weights exactly 1.
        floor: in [0, 1 / K]: the smallest share of a teacher before normalization.
        max_weight: >= 1, bounds the language weights.
        memory: rows in a running mean, > 0; fewer rows are averaged with equal weights.
        process_group: the processes that share one state; default: all, where `torch.distributed` is initialized.

    Raises:
        TypeError: an argument of another type.
        ValueError: an argument outside its range.
    """

    def __init__(
        self,
        n_teachers: int,
        n_languages: int,
        *,
        importance_temperature: float | None = None,
        gap_temperature: float | None = None,
        floor: float = 0.01,
        max_weight: float = 2.0,
        memory: float = 4096.0,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        for name, number in (("n_teachers", n_teachers), ("n_languages", n_languages)):
            if not isinstance(number, int) or isinstance(number, bool):
                raise TypeError(f"{name} must be an integer, got {number!r}")
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        check_adaptive_options(importance_temperature, gap_temperature)
        for name, value in (("floor", floor), ("max_weight", max_weight), ("memory", memory)):
            _check_number(name, value)
        if not 0 <= floor <= 1 / n_teachers:
            raise ValueError(f"floor must be in [0, 1 / {n_teachers}] for {n_teachers} teachers, got {floor}")
        if not 1 <= max_weight < math.inf:
            raise ValueError(f"max_weight must be finite and at least 1, got {max_weight}")
        if not memory > 0:
            raise ValueError(f"memory must be above 0, got {memory}")
        self.n_teachers = n_teachers
        self.n_languages = n_languages
        self.importance_temperature = importance_temperature
        self.gap_temperature = gap_temperature
        self.floor = floor
        self.max_weight = max_weight
        self.memory = memory
        self.process_group = process_group
        self._shares = torch.zeros(n_teachers, n_languages)
        # K teachers, then the student: means of margins, and the rows that they stand on, at most `memory`.
        self._means = torch.zeros(n_teachers + 1, n_languages)
        self._counts = torch.zeros(n_teachers + 1, n_languages)
        # Rows of each language since the start; float32 stops counting at 2**24.
        self._rows = torch.zeros(n_languages, dtype=torch.float64)
        # Sums since the last step: margins of teachers and student, their numbers of rows, shares of the teachers.
        self._pending: Tensor | None = None
        self._cache: tuple[Tensor, Tensor] | None = None

    def update(
        self,
        stats: AMTSSStats,
        language_ids: Tensor,
        *,
        teacher_mask: Tensor | None = None,
        row_mask: Tensor | None = None,
    ) -> None:
        """Adds a batch; it takes effect at the next :meth:`step`. Nothing here waits for the device.

        Args:
            stats: of the loss.
            language_ids: [N] int64.
            teacher_mask: [K, N] bool, the one that the loss had.
            row_mask: [N] bool, the rows to use. Leave out rows without a label where others have one: their margins
                only measure how certain a teacher is, and a wrong teacher may be certain.

        Raises:
            TypeError: ids or masks of another type.
            ValueError: a shape that does not fit, or an id that is no language.
        """
        margins = torch.cat([stats.margins, stats.student_margin.unsqueeze(0)])
        self._note(*self._rows_of(margins, language_ids, teacher_mask, row_mask))

    def start(
        self,
        margins: Tensor,
        language_ids: Tensor,
        *,
        teacher_mask: Tensor | None = None,
        row_mask: Tensor | None = None,
    ) -> None:
        """Takes margins [K, N] of held-out rows as the teachers' first running means; the shares are iterated until
        they converge. Pass all rows in one call, in one process; :meth:`step` shares them with the other processes.
        """
        padded = torch.cat([margins, margins.new_zeros(1, margins.shape[-1])]) if margins.dim() == 2 else margins
        values, counts, one_hot = self._rows_of(padded, language_ids, teacher_mask, row_mask)
        counts[-1] = False
        alpha = self._teacher_weights().to(values.device)
        rows = counts[:-1].float() @ one_hot
        for _ in range(_START_STEPS):
            shares = self._shares_of_rows(values, counts, one_hot, alpha)
            alpha = self._normalized(shares @ one_hot, rows)
        self._note(values, counts, one_hot, alpha)

    def step(self) -> None:
        """Applies what :meth:`update` added, over all processes; call it in each of them after an optimizer step."""
        device = self._means.device if self._pending is None else self._pending.device
        shape = (3 * self.n_teachers + 2, self.n_languages)
        pending = torch.zeros(shape, device=device) if self._pending is None else self._pending
        self._pending = None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(pending, group=self.process_group)
        sums, counts, shares = pending.split([self.n_teachers + 1, self.n_teachers + 1, self.n_teachers])
        self._to(device)
        total = self._counts + counts
        means = (self._means * self._counts + sums) / total.clamp(min=1)
        self._means = torch.where(counts > 0, means, self._means)
        self._shares = (self._shares * self._counts[:-1] + shares) / total[:-1].clamp(min=1)
        self._counts = total.clamp(max=min(self.memory, _UNBOUNDED))
        self._rows = self._rows + counts[-1]
        self._cache = None

    def teacher_prior(self, language_ids: Tensor) -> Tensor:
        """[K, N]: the importance of each teacher in the language of each row; ones when it is off."""
        self._check_ids(language_ids)
        return self.importance.to(language_ids.device)[:, language_ids]

    def sample_weight(self, language_ids: Tensor) -> Tensor:
        """[N]: the weight of the language of each row; ones when it is off."""
        self._check_ids(language_ids)
        return self.language_weight.to(language_ids.device)[language_ids]

    @property
    def teacher_margin(self) -> Tensor:
        """[K, L] running mean of the teachers' margins; 0 where :attr:`teacher_rows` is 0."""
        return self._means[:-1]

    @property
    def teacher_rows(self) -> Tensor:
        """[K, L] rows that the teachers' means stand on, at most `memory`."""
        return self._counts[:-1]

    @property
    def student_margin(self) -> Tensor:
        """[L] running mean of the student's margin."""
        return self._means[-1]

    @property
    def importance(self) -> Tensor:
        """[K, L] alpha; each column adds up to 1, or is all ones when it is off."""
        return self._weights()[0]

    @property
    def language_weight(self) -> Tensor:
        """[L] r; exactly ones when it is off."""
        return self._weights()[1]

    def state_dict(self) -> dict[str, Tensor]:
        """`means` and `counts` [K + 1, L] (teachers, then the student), `shares` [K, L] and `rows` [L], on the CPU."""
        state = {"means": self._means, "counts": self._counts, "shares": self._shares, "rows": self._rows}
        return {name: value.detach().cpu().clone() for name, value in state.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a :meth:`state_dict`; options are not part of it.

        Raises:
            ValueError: other names, or another number of teachers or languages.
        """
        own = self.state_dict()
        if set(state) != set(own):
            raise ValueError(f"state must hold {sorted(own)}, got {sorted(state)}")
        for name, value in own.items():
            if state[name].shape != value.shape:
                raise ValueError(
                    f"state[{name!r}] has shape {list(state[name].shape)}, {self.n_teachers} teachers and "
                    f"{self.n_languages} languages need {list(value.shape)}"
                )
        self._means, self._counts, self._shares, self._rows = (
            state[name].to(self._means.device, own[name].dtype, copy=True) for name in own
        )
        self._pending = self._cache = None

    def _check_ids(self, language_ids: Tensor) -> None:
        """Raise for what is no language: a negative id would count from the end."""
        if not isinstance(language_ids, Tensor):
            raise TypeError(f"language_ids must be a tensor, got {type(language_ids).__name__}")
        if language_ids.dtype != torch.int64:
            raise TypeError(f"language_ids must be int64, got {language_ids.dtype}")
        if language_ids.dim() != 1:
            raise ValueError(f"language_ids must be [N], got shape {list(language_ids.shape)}")
        if values_are_free(language_ids) and language_ids.numel() > 0:
            low, high = (int(x) for x in language_ids.aminmax())
            if low < 0 or high >= self.n_languages:
                wrong = low if low < 0 else high
                raise ValueError(f"language_ids must be in [0, {self.n_languages}), found {wrong}")

    def _rows_of(
        self, margins: Tensor, language_ids: Tensor, teacher_mask: Tensor | None, row_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Margins [K + 1, N], 0 where they do not count; which count [K + 1, N]; the languages one-hot [N, L]."""
        self._check_ids(language_ids)
        n_rows = len(language_ids)
        if margins.shape != (self.n_teachers + 1, n_rows):
            raise ValueError(
                f"margins of {self.n_teachers} teachers and {n_rows} rows (language_ids) must be "
                f"[{self.n_teachers}, {n_rows}], got {[max(0, margins.shape[0] - 1), *margins.shape[1:]]}"
            )
        counts = torch.ones_like(margins, dtype=torch.bool)
        if teacher_mask is not None:
            counts[:-1] &= _shaped("teacher_mask", teacher_mask, (self.n_teachers, n_rows))
        if row_mask is not None:
            counts &= _shaped("row_mask", row_mask, (n_rows,))
        # A product with one-hot rows adds up in a fixed order, which index_add_ on a GPU does not.
        one_hot = torch.nn.functional.one_hot(language_ids, self.n_languages).to(torch.float32)
        return margins.detach().float().clamp(min=_LEAST_MARGIN).where(counts, 0.0), counts, one_hot

    def _note(self, values: Tensor, counts: Tensor, one_hot: Tensor, alpha: Tensor | None = None) -> None:
        alpha = self._teacher_weights().to(values.device) if alpha is None else alpha
        shares = self._shares_of_rows(values, counts, one_hot, alpha)
        sums = torch.cat([values, counts.float(), shares]) @ one_hot
        self._pending = sums if self._pending is None else self._pending + sums

    def _shares_of_rows(self, values: Tensor, counts: Tensor, one_hot: Tensor, alpha: Tensor) -> Tensor:
        """[K, N]: each teacher's share of the rows; those of a row add up to 1 over the teachers that count."""
        temperature = math.inf if self.importance_temperature is None else self.importance_temperature
        evidence = alpha.log() @ one_hot.T + values[:-1] / temperature
        return torch.where(counts[:-1], evidence.where(counts[:-1], -math.inf).softmax(0), 0.0)

    def _normalized(self, shares: Tensor, rows: Tensor) -> Tensor:
        """[K, L] alpha from sums of shares and numbers of rows."""
        alpha = ((shares + _EQUAL_ROWS / self.n_teachers) / (rows + _EQUAL_ROWS)).clamp(min=self.floor)
        return alpha / alpha.sum(0)

    def _weights(self) -> tuple[Tensor, Tensor]:
        if self._cache is None:
            alpha = self._teacher_weights()
            off = self.importance_temperature is None
            self._cache = (torch.ones_like(alpha) if off else alpha, self._language_weights(alpha))
        return self._cache

    def _teacher_weights(self) -> Tensor:
        """[K, L] alpha, uniform when it is off."""
        if self.importance_temperature is None:
            return torch.full_like(self._shares, 1 / self.n_teachers)
        return self._normalized(self._shares * self.teacher_rows, self.teacher_rows)

    def _language_weights(self, alpha: Tensor) -> Tensor:
        ones = torch.ones_like(self._means[-1])
        if self.gap_temperature is None:
            return ones
        # A teacher that does not teach a language has no part in its gap.
        alpha = alpha * (self.teacher_rows > 0)
        alpha = alpha / alpha.sum(0).clamp(min=1e-30)
        gap = ((alpha * self.teacher_margin).sum(0) - self.student_margin).clamp(min=0)
        # Languages without data have weight 1 and no part in the mean.
        known = (self._counts[-1] > 0) & (self.teacher_rows > 0).any(0)
        rows = (self._rows * known).float()
        weight = ((gap - gap.max()) / self.gap_temperature).exp()
        most = min(self.max_weight, _UNBOUNDED)
        for _ in range(2):
            weight = weight * rows.sum() / (weight * rows).sum().clamp(min=1e-30)
            weight = weight.clamp(1 / most, most)
        weight = weight * rows.sum() / (weight * rows).sum().clamp(min=1e-30)
        return torch.where(known, weight, ones)

    def _to(self, device: torch.device) -> None:
        self._means, self._counts, self._shares, self._rows = (
            t.to(device) for t in (self._means, self._counts, self._shares, self._rows)
        )


def check_adaptive_options(importance_temperature: float | None, gap_temperature: float | None) -> None:
    """Raise TypeError or ValueError for a temperature that is no number above 0."""
    for name, value in (("importance_temperature", importance_temperature), ("gap_temperature", gap_temperature)):
        if value is not None:
            _check_number(name, value)
        # Written so that NaN is wrong too.
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be above 0 (inf: uniform), or None for off; got {value}")
        if value is not None and value < _LEAST_TEMPERATURE:
            raise ValueError(f"{name} must be at least {_LEAST_TEMPERATURE}, got {value}")


def _check_number(name: str, value: float) -> None:
    if not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")


def _shaped(name: str, mask: Tensor, shape: tuple[int, ...]) -> Tensor:
    if not isinstance(mask, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(mask).__name__}")
    if mask.shape != shape or mask.dtype != torch.bool:
        raise ValueError(f"{name} must be bool {list(shape)}, got {mask.dtype} {list(mask.shape)}")
    return mask
