"""The loss from hidden states and heads: the logits of a large vocabulary are never held at once.

    python examples/fused_head.py

Compares `linear_amtss_loss` with `amtss_loss` of the full logits, then takes teacher heads in bfloat16 and in 8 bits.
"""

import torch

from amtss_fast import amtss_loss, linear_amtss_loss, quantize_weight


def main() -> None:
    torch.manual_seed(0)
    tokens, classes = 256, 20_000
    hidden = torch.randn(tokens, 64, requires_grad=True)
    head = torch.nn.Linear(64, classes)
    # Teachers may differ in width.
    teacher_hidden = [torch.randn(tokens, 96), torch.randn(tokens, 128)]
    teacher_heads = [0.1 * torch.randn(classes, states.shape[1]) for states in teacher_hidden]
    labels = torch.randint(classes, (tokens,))
    labels[::2] = -100  # ignored: these rows are left out of the matrix products

    loss = linear_amtss_loss(
        hidden, head.weight, teacher_hidden, teacher_heads, labels, student_bias=head.bias, ce_weight=0.5, chunk_rows=32
    )
    (gradient,) = torch.autograd.grad(loss, hidden)

    teacher_logits = [states @ weight.T for states, weight in zip(teacher_hidden, teacher_heads, strict=True)]
    full = amtss_loss(head(hidden), teacher_logits, labels, ce_weight=0.5)
    (full_gradient,) = torch.autograd.grad(full, hidden)
    torch.testing.assert_close(loss, full)
    torch.testing.assert_close(gradient, full_gradient, rtol=1e-4, atol=1e-7)
    print(f"loss {loss.item():.6f}, from the full logits {full.item():.6f}")

    # A vocabulary may be padded: classes beyond the student's are left out.
    padded = torch.cat([teacher_heads[1], torch.zeros(24, 128)])
    smaller = [teacher_heads[0].bfloat16(), quantize_weight(padded)]
    loss = linear_amtss_loss(
        hidden, head.weight, teacher_hidden, smaller, labels, student_bias=head.bias, ce_weight=0.5
    )
    print(f"with teacher heads in bfloat16 and 8 bits {loss.item():.6f}")


if __name__ == "__main__":
    main()
