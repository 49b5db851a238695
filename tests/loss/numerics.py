"""Inputs for the loss, its float64 value, and the error that a backend may have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from amtss_fast import AMTSSStats, QuantizedLogits, TopKLogprobs, amtss_loss

IGNORED, UNLABELED = -100, -1


@dataclass
class Case:
    """One call of the loss: tensors and options."""

    student: Tensor
    teachers: list[Tensor | QuantizedLogits] | Tensor
    labels: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, backend: str | None, grad_output: Tensor | None = None) -> Result:
        student = self.student.detach().requires_grad_()
        loss, stats = amtss_loss(
            student, self.teachers, self.labels, return_stats=True, backend=backend, **self.options
        )
        loss.backward(torch.ones_like(loss) if grad_output is None else grad_output)
        assert student.grad is not None
        assert student.grad.dtype == student.dtype
        return Result(loss.detach(), student.grad, stats)

    def exact(self, grad_output: Tensor | None = None) -> Result:
        """The same in float64, from the same (already rounded) inputs."""
        teachers = [_double(t) for t in self.teachers]
        options = {name: _double(o) for name, o in self.options.items()}
        case = replace(self, student=self.student.double(), teachers=teachers, options=options)
        return case.run("reference", None if grad_output is None else grad_output.double())

    def to(self, device: str) -> Case:
        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor | QuantizedLogits | TopKLogprobs) else x

        teachers = move(self.teachers) if isinstance(self.teachers, Tensor) else [move(t) for t in self.teachers]
        options = {name: move(o) for name, o in self.options.items()}
        return Case(move(self.student), teachers, move(self.labels), options)


@dataclass
class Result:
    loss: Tensor
    grad: Tensor
    stats: AMTSSStats

    def parts(self) -> dict[str, Tensor]:
        return {name: t.cpu() for name, t in {"loss": self.loss, "grad": self.grad, **self.stats._asdict()}.items()}


def make_case(
    n: int,
    c: int,
    k: int = 3,
    *,
    dtype: torch.dtype = torch.float32,
    teacher_dtypes: Sequence[torch.dtype] | None = None,
    spread: float = 2.0,
    special_rows: bool = True,
    masked: bool = False,
    weighted: bool = False,
    seed: int = 0,
    **options: Any,
) -> Case:
    """Random logits; the first and last class among the labels, some rows ignored, some without a label."""
    # Drawn on the CPU, so that every device sees the same numbers.
    with torch.device("cpu"):
        g = torch.Generator().manual_seed(seed)
        common = torch.randn(n, c, generator=g)
        student = (spread * (common + torch.randn(n, c, generator=g))).to(dtype)
        teacher_dtypes = teacher_dtypes or [dtype] * k
        teachers = [(spread * (common + torch.randn(n, c, generator=g))).to(d) for d in teacher_dtypes]
        labels = torch.randint(c, (n,), generator=g)
        labels[: n // 8 + 1] = 0
        labels[n // 8 + 1 : n // 4 + 1] = c - 1
        if special_rows:
            labels[2::7] = IGNORED
            labels[3::5] = UNLABELED
        if masked:
            options["teacher_mask"] = torch.rand(k, n, generator=g) < 0.6
            options["teacher_prior"] = torch.rand(k, n, generator=g) * (torch.rand(k, n, generator=g) < 0.8)
        if weighted:
            options["sample_weight"] = torch.rand(n, generator=g) * (torch.rand(n, generator=g) < 0.8)
        case = Case(student, list(teachers), labels, options)
    return case.to(str(torch.get_default_device()))


def assert_within_budget(actual: Result, case: Case, grad_output: Tensor | None = None) -> None:
    """The error against float64 is at most twice that of plain torch in the same dtype, plus rounding of the output.

    Errors are measured against the largest value of a part, infinities and NaN have to be where float64 has them.
    """
    exact, plain = case.exact(grad_output).parts(), case.run("reference", grad_output).parts()
    size = max(float(t.float().nan_to_num(0, 0, 0).abs().max()) if t.numel() else 0.0 for t in _logits(case))
    assert_parts_within_budget(actual.parts(), exact, plain, size / float(case.options.get("temperature", 2.0)))


def assert_parts_within_budget(
    actual: dict[str, Tensor],
    exact: dict[str, Tensor],
    plain: dict[str, Tensor],
    exponent: float,
    least: Mapping[str, float] | None = None,
) -> None:
    """See :func:`assert_within_budget`.

    `exponent`: the largest magnitude that a softmax exponentiates. `least`: the scale of each part at least. Over few
    rows plain torch may be exact by chance, and a sum may be much smaller than what it adds up.
    """
    # The exponent of a float32 softmax is itself only good to eps times its size.
    floor = torch.finfo(torch.float32).eps * (4 + exponent)
    for name, got in actual.items():
        want, reference = exact[name], plain[name].double().cpu()
        got64 = got.double().cpu()
        assert got64.shape == want.shape, name
        assert torch.equal(got64.isnan(), want.isnan()), f"{name}: NaN elsewhere"
        assert torch.equal(got64.isinf(), want.isinf()), f"{name}: infinite elsewhere"
        finite = want.isfinite()
        if not finite.any():
            continue
        scale = float(want[finite].abs().max())
        error = float((got64 - want)[finite].abs().max())
        allowed = 2 * float((reference - want)[finite].abs().max())
        allowed += floor * max(scale, (least or {}).get(name, 1e-3)) + torch.finfo(got.dtype).eps * scale
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g} (largest value {scale:.3g})"


def _logits(case: Case) -> list[Tensor]:
    teachers = (_double(t) for t in case.teachers)
    return [case.student, *(t.logprobs if isinstance(t, TopKLogprobs) else t for t in teachers)]


def _double(x: Any) -> Any:
    if isinstance(x, QuantizedLogits):
        return x.dequantize().double()
    if isinstance(x, TopKLogprobs):
        return x._replace(logprobs=x.logprobs.double())
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
