"""Teacher importance and language weights that are learned while the student trains.

    python examples/adaptive_strategy.py

Two teachers, four languages: the first teacher is good at languages 0 and 1, the second at languages 2 and 3.
`AdaptiveStrategy` finds this from the margins that the loss returns. Its state, `adaptive.state_dict()`, belongs in the
checkpoints of a training.
"""

import torch

from amtss_fast import AdaptiveStrategy, amtss_loss

N_CLASSES, N_LANGUAGES = 3, 4
TAUGHT = torch.tensor([[True, True, False, False], [False, False, True, True]])  # [teachers, languages]


def teacher_logits(labels: torch.Tensor, language_ids: torch.Tensor) -> list[torch.Tensor]:
    """Noise, with the right class raised in the languages of the teacher."""
    right = torch.nn.functional.one_hot(labels, N_CLASSES)
    return [torch.randn(len(labels), N_CLASSES) + 4 * right * taught[language_ids].unsqueeze(1) for taught in TAUGHT]


def main() -> None:
    torch.manual_seed(0)
    student = torch.nn.Linear(16, N_CLASSES)
    optimizer = torch.optim.AdamW(student.parameters(), lr=0.01)
    adaptive = AdaptiveStrategy(
        n_teachers=len(TAUGHT), n_languages=N_LANGUAGES, importance_temperature=0.2, gap_temperature=0.5
    )

    for _ in range(100):
        inputs, language_ids = torch.randn(64, 16), torch.randint(N_LANGUAGES, (64,))
        labels = inputs[:, :N_CLASSES].argmax(1)
        loss, stats = amtss_loss(
            student(inputs),
            teacher_logits(labels, language_ids),
            labels,
            teacher_prior=adaptive.teacher_prior(language_ids),  # [K, N]
            sample_weight=adaptive.sample_weight(language_ids),  # [N]
            return_stats=True,
        )
        # Rows without a label would be left out: a wrong teacher is confident too.
        adaptive.update(stats, language_ids, row_mask=labels >= 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        adaptive.step()

    for name, importance in zip(("first", "second"), adaptive.importance, strict=True):
        print(f"importance of the {name} teacher in each language", [round(x, 2) for x in importance.tolist()])
    print("weight of each language", [round(x, 2) for x in adaptive.language_weight.tolist()])


if __name__ == "__main__":
    main()
