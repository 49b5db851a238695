"""Each divergence is that of the libraries it comes from, called on the same logits, in its value and in its gradient.

With one teacher its weight is 1, so the loss is the divergence times temperature². The others leave this factor out,
and here `kd_weight` takes it back. A library that is not installed is skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from amtss_fast import amtss_loss, linear_amtss_loss

pytestmark = [
    # Of Triton's interpreter, where a row ends before its block does.
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'"),
]
TEMPERATURE = 2.0
IGNORED = -100

# The mean of the divergence over rows, of the student's and the teacher's logits; IGNORED rows do not count.
Peer = Callable[[Tensor, Tensor, Tensor], Tensor]


def forward_reverse_or_jsd(beta: float) -> dict[str, Any]:
    """What TRL and Liger call `beta`, in the options of this library."""
    if beta in (0, 1):
        return {"divergence": "reverse_kl" if beta == 1 else "forward_kl"}
    return {"divergence": "jsd", "divergence_beta": beta}


def trl_gkd(beta: float) -> Peer:
    """The loss of TRL's trainer for generalized knowledge distillation."""
    pytest.importorskip("trl", reason="TRL is not installed")
    trainer = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = trainer.generalized_jsd_loss(
            student[None], teacher[None], labels[None], beta=beta, temperature=TEMPERATURE
        )
        return value

    return loss


def trl_chunked(beta: float) -> Peer:
    """TRL's divergence of hidden states and heads. With heads that change nothing, hidden states are logits."""
    pytest.importorskip("trl", reason="TRL is not installed")
    chunked = pytest.importorskip("trl.kernels.chunked_divergence", reason="this TRL has no chunked divergence")

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        head = torch.eye(student.shape[1], dtype=student.dtype)
        apply = chunked.ChunkedDivergenceFunction.apply
        rows, _ = apply(student, head, None, teacher, head, None, beta, TEMPERATURE)
        mean: Tensor = rows[labels != IGNORED].mean()
        return mean

    return loss


def liger_jsd(beta: float) -> Peer:
    """Liger's kernel."""
    jsd = pytest.importorskip("liger_kernel.transformers.jsd", reason="liger-kernel is not installed").LigerJSD(beta)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        log_q, log_p = ((logits / TEMPERATURE).log_softmax(-1) for logits in (student, teacher))
        value: Tensor = jsd(log_q, log_p, labels)
        return value

    return loss


def liger_fused_jsd(beta: float) -> Peer:
    """Liger's divergence of hidden states and heads, in torch."""
    module = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss", reason="liger-kernel is not installed")
    fused = module.LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=TEMPERATURE, compiled=False, chunk_size=2
    )

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        head = torch.eye(student.shape[1], dtype=student.dtype)
        value: Tensor = fused(student, head.requires_grad_(), teacher, head, labels)
        return value

    return loss


def liger_kl() -> Peer:
    module = pytest.importorskip("liger_kernel.transformers.kl_div", reason="liger-kernel is not installed")
    kl = module.LigerKLDIVLoss(reduction="batchmean", log_target=True)

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        counts = labels != IGNORED
        value: Tensor = kl(*((logits[counts] / TEMPERATURE).log_softmax(-1) for logits in (student, teacher)))
        return value

    return loss


def liger_tvd() -> Peer:
    tvd = pytest.importorskip("liger_kernel.transformers.tvd", reason="liger-kernel is not installed").LigerTVDLoss()

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = tvd(*((logits / TEMPERATURE).softmax(-1) for logits in (student, teacher)), labels)
        return value

    return loss


def textbrewer_ce() -> Peer:
    """TextBrewer's cross entropy is the forward KL and the teacher's entropy, which has no gradient."""
    pytest.importorskip("textbrewer", reason="TextBrewer is not installed")
    kd_ce_loss = importlib.import_module("textbrewer.losses").kd_ce_loss

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        counts = labels != IGNORED
        log_p = (teacher[counts] / TEMPERATURE).log_softmax(-1)
        entropy = -(log_p.exp() * log_p).sum(-1).mean()
        value: Tensor = kd_ce_loss(student[counts], teacher[counts], TEMPERATURE) - entropy
        return value

    return loss


def distillm(reverse: bool, skew: float) -> Peer:
    """The skewed KL of DistiLLM (arXiv 2402.03898), which is no package, from its formula."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        q, p = ((logits / TEMPERATURE).softmax(-1) for logits in (student, teacher))
        own, other = (q, p) if reverse else (p, q)
        rows = (own * (own / (skew * own + (1 - skew) * other)).log()).sum(-1)
        return rows[labels != IGNORED].mean()

    return loss


CASES: list[Any] = [
    *(
        pytest.param(peer, (beta,), forward_reverse_or_jsd(beta), id=f"{peer.__name__}-{beta}")
        for peer in (trl_gkd, trl_chunked, liger_jsd, liger_fused_jsd)
        for beta in (0.0, 0.1, 0.5, 1.0)
    ),
    pytest.param(liger_kl, (), {"divergence": "forward_kl"}, id="liger_kl"),
    pytest.param(liger_tvd, (), {"divergence": "tvd"}, id="liger_tvd"),
    pytest.param(textbrewer_ce, (), {"divergence": "forward_kl"}, id="textbrewer_ce"),
    *(
        pytest.param(distillm, (reverse, skew), {"divergence": name, "divergence_beta": skew}, id=f"{name}-{skew}")
        for reverse, name in ((False, "skew_forward_kl"), (True, "skew_reverse_kl"))
        for skew in (0.1, 0.5)
    ),
]
TRITON_KERNELS = (liger_jsd, liger_kl, liger_tvd)
# All or some of their sums are in float32.
IN_FLOAT32 = (*TRITON_KERNELS, trl_chunked, liger_fused_jsd)


class Scalar(float):
    """A float argument of a kernel. In Triton's interpreter it has no type that the kernel could convert."""

    def to(self, dtype: object) -> Scalar:
        return self


class Interpreted:
    """A kernel whose float arguments are :class:`Scalar`."""

    def __init__(self, kernel: Any):
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **keywords: Any) -> None:
            def scalar(value: Any) -> Any:
                return Scalar(value) if isinstance(value, float) else value

            self.kernel[grid](*map(scalar, args), **{name: scalar(value) for name, value in keywords.items()})

        return launch


@pytest.fixture(autouse=True)
def _kernels_run_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available() or importlib.util.find_spec("liger_kernel") is None:
        return
    for module, name in (("tvd", "_tv_distance_kernel"), ("kl_div", "_kldiv_kernel_forward")):
        found = importlib.import_module(f"liger_kernel.ops.{module}")
        monkeypatch.setattr(found, name, Interpreted(getattr(found, name)))


def value_and_gradient(loss: Callable[[Tensor], Tensor], logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.detach().double().cpu(), leaf.grad.double().cpu()


def ours(student: Tensor, teacher: Tensor, labels: Tensor, backend: str, options: dict[str, Any]) -> Any:
    dtype = torch.float64 if backend == "reference" else torch.float32
    options = options | {"temperature": TEMPERATURE, "kd_weight": TEMPERATURE**-2, "backend": backend}
    teachers = teacher.to(dtype)[None]
    return value_and_gradient(lambda leaf: amtss_loss(leaf, teachers, labels, **options), student.to(dtype))


def theirs(
    peer: Callable[..., Peer], arguments: tuple[Any, ...], student: Tensor, teacher: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    loss = peer(*arguments)
    dtype = torch.float32 if peer in IN_FLOAT32 else torch.float64
    device = "cuda" if peer in TRITON_KERNELS and torch.cuda.is_available() else student.device
    teacher, labels = teacher.to(device, dtype), labels.to(device)
    return value_and_gradient(lambda leaf: loss(leaf, teacher, labels), student.to(device, dtype))


@pytest.mark.parametrize(("peer", "arguments", "options"), CASES)
def test_divergence_is_that_of(
    peer: Callable[..., Peer], arguments: tuple[Any, ...], options: dict[str, Any], backend: str
) -> None:
    torch.manual_seed(0)
    student, teacher = 3 * torch.randn(2, 5, 37)
    labels = torch.tensor([3, 0, IGNORED, 36, 7])
    want, want_gradient = theirs(peer, arguments, student, teacher, labels)
    got, gradient = ours(student, teacher, labels, backend, options)
    exact = backend == "reference" and peer not in IN_FLOAT32
    rtol, atol = (1e-9, 1e-12) if exact else (2e-5, 1e-6)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)
    torch.testing.assert_close(gradient, want_gradient, rtol=rtol, atol=atol)
    assert not gradient[2].any()


@pytest.mark.parametrize(("peer", "arguments", "options"), CASES)
def test_gradient_at_equal_logits(
    peer: Callable[..., Peer], arguments: tuple[Any, ...], options: dict[str, Any], backend: str
) -> None:
    """It is exactly 0 here. The others round: they are near 0."""
    torch.manual_seed(1)
    logits, labels = 3 * torch.randn(4, 37), torch.arange(4)
    value, gradient = ours(logits, logits, labels, backend, options)
    assert value.item() == 0
    assert not gradient.any()
    _, rounded = theirs(peer, arguments, logits, logits, labels)
    assert rounded.abs().amax() < 1e-6


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_fused_head_is_that_of_liger(beta: float, backend: str) -> None:
    """In the gradients of hidden states and head; the cross entropy of the labels is what Liger calls the hard loss."""
    liger = pytest.importorskip("liger_kernel.chunked_loss.jsd_loss", reason="liger-kernel is not installed")
    torch.manual_seed(2)
    hidden, teacher_hidden = torch.randn(6, 8), torch.randn(6, 9)
    head, teacher_head = torch.randn(37, 8), torch.randn(37, 9)
    labels = torch.tensor([3, 0, IGNORED, 36, 7, 12])

    fused = liger.LigerFusedLinearJSDLoss(0.25, 0.75, beta, temperature=TEMPERATURE, compiled=False, chunk_size=2)
    liger_own = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
    want = fused(*liger_own, teacher_hidden, teacher_head, labels)
    want.backward()

    options = {"temperature": TEMPERATURE, "ce_weight": 0.25, "kd_weight": 0.75 * TEMPERATURE**-2, "backend": backend}
    own = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
    got = linear_amtss_loss(
        *own, [teacher_hidden], [teacher_head], labels, **options, **forward_reverse_or_jsd(beta), chunk_rows=2
    )
    got.backward()
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)
    for tensor, other in zip(own, liger_own, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad, rtol=1e-4, atol=1e-5)
