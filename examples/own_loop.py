"""The loss in your own training loop: three teachers, each of them good at some inputs only, and one student.

    python examples/own_loop.py

Every class is a cloud of points. Each teacher has seen two of the three classes, and only one row in four has a label;
the student learns all three from the teachers and these labels.
"""

import torch
from torch.nn.functional import cross_entropy

from amtss_fast import amtss_loss

N_CLASSES, WIDTH = 3, 16


def draw(rows: int, centers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs [rows, WIDTH] around the center of their class, and the classes [rows]."""
    labels = torch.randint(N_CLASSES, (rows,))
    return centers[labels] + torch.randn(rows, WIDTH), labels


def train_teacher(classes: list[int], centers: torch.Tensor) -> torch.nn.Module:
    """A linear classifier that has seen only `classes`."""
    inputs, labels = draw(1000, centers)
    seen = torch.isin(labels, torch.tensor(classes))
    teacher = torch.nn.Linear(WIDTH, N_CLASSES)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(teacher(inputs[seen]), labels[seen]).backward()
        optimizer.step()
    return teacher.eval()


def main() -> None:
    torch.manual_seed(0)
    centers = 2 * torch.randn(N_CLASSES, WIDTH)
    teachers = [train_teacher(classes, centers) for classes in ([0, 1], [1, 2], [0, 2])]
    student = torch.nn.Linear(WIDTH, N_CLASSES)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.02)

    for step in range(1, 101):
        inputs, labels = draw(64, centers)
        labels[16:] = -1  # no label: these rows are distilled only
        with torch.no_grad():
            teacher_logits = [teacher(inputs) for teacher in teachers]
        loss, stats = amtss_loss(
            student(inputs), teacher_logits, labels, ce_weight=0.5, weight_temperature=0.2, return_stats=True
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 25 == 0:
            weights = ", ".join(f"{weight:.2f}" for weight in stats.weights.mean(1))
            print(f"step {step}: loss {loss.item():.3f}, mean weight of each teacher {weights}")

    inputs, labels = draw(2000, centers)
    for name, model in (("student", student), *((f"teacher {k}", t) for k, t in enumerate(teachers))):
        print(f"accuracy of {name}: {(model(inputs).argmax(1) == labels).float().mean():.1%}")


if __name__ == "__main__":
    main()
