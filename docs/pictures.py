"""Draws the pictures of the losses: what one step asks of each document of one list, from `st_wkl.functional` itself.

Run: python docs/pictures.py    (writes docs/assets/losses/*.svg; tests compare them with what stands there)
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

import st_wkl.functional as functional

FOLDER = Path(__file__).parent / "assets" / "losses"
# One list, as the student ranks it: cosines, a teacher's logits, and which document is judged relevant. The teacher
# agrees that C is best, likes A (a false negative, perhaps), and B, which stands above C, is simply wrong.
COSINES = torch.tensor([[0.60, 0.57, 0.55, 0.53, 0.49, 0.42]], dtype=torch.float64)
LOGITS = torch.tensor([[3.5, -1.0, 4.0, 2.0, 0.0, -3.0]], dtype=torch.float64)
POSITIVES = torch.tensor([[False, False, True, False, False, False]])
# Documents of other queries of the batch, of which neither teacher nor judgement says anything.
OTHERS = torch.tensor([[0.52, 0.47, 0.41, 0.30]], dtype=torch.float64)
BLUE, ORANGE, GREY = "#3f6fd1", "#d9772b", "#808080"
NEITHER: dict[str, float] = {"student_temperature": 0.05}
TOP, SPAN, STEP = 62, 76, 62


def in_batch(scores: Tensor) -> Tensor:
    """In-batch contrast: the list and the documents of the other queries."""
    positives = torch.cat([POSITIVES, torch.zeros(1, OTHERS.shape[1], dtype=torch.bool)], dim=1)
    return functional.list_contrastive(scores, positives, **NEITHER)


def kl(scores: Tensor) -> Tensor:
    """KL over the list."""
    return functional.kl_divergence(scores, LOGITS, **NEITHER)


def pair_distill(scores: Tensor) -> Tensor:
    """KL, neighbours in the teacher's ranking by its own scores, and in-batch contrast over other documents."""
    own = scores[:, :6]
    order = LOGITS[0].argsort(descending=True).tolist()
    pairs = torch.tensor([[0, first, second] for first, second in pairwise(order)])
    probabilities = torch.sigmoid(LOGITS[0, pairs[:, 1]] - LOGITS[0, pairs[:, 2]])
    others = torch.cat([own[:, 2:3], scores[:, 6:]], dim=1)
    positives = torch.tensor([[True, *[False] * OTHERS.shape[1]]])
    contrast = functional.list_contrastive(others, positives, **NEITHER)
    return kl(own) + functional.pairwise_kl(own, pairs, probabilities, **NEITHER) + contrast


PICTURES: dict[str, Callable[[Tensor], Tensor]] = {
    "kl": kl,
    "weighted-kl": lambda s: functional.weighted_kl(s, LOGITS, POSITIVES, gamma=2.0, alpha=1.0, **NEITHER),
    "regularised-kl": lambda s: functional.regularised_kl(s, LOGITS, POSITIVES, beta=0.02, **NEITHER),
    "margin-kl": lambda s: functional.margin_kl(s, LOGITS, POSITIVES, **NEITHER),
    "margin-mse": lambda s: functional.margin_mse(s, LOGITS, POSITIVES, **NEITHER),
    "mse": lambda s: functional.pointwise_mse(s, LOGITS, **NEITHER),
    "rank-net": lambda s: functional.rank_net(s, LOGITS, **NEITHER),
    "pearson": lambda s: functional.pearson(s, LOGITS),
    "list-contrastive": lambda s: functional.list_contrastive(s, POSITIVES, **NEITHER),
    "in-batch": in_batch,
    "pair-distill": pair_distill,
    "kl-in-batch": lambda s: kl(s[:, :6]) + in_batch(s),
}


def pushes(loss: Callable[[Tensor], Tensor], scores: Tensor) -> list[float]:
    """Return where a step of gradient descent moves each score, the largest move being 1."""
    scores = scores.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(scores), scores)
    moves = -gradient[0]
    return (moves / moves.abs().max()).tolist()


def svg(name: str) -> str:
    """Return a picture: a bar up or down for each document, below what student, teacher and judgement say of it."""
    wide = name in ("in-batch", "pair-distill", "kl-in-batch")
    scores = torch.cat([COSINES, OTHERS], dim=1) if wide else COSINES
    moves = pushes(PICTURES[name], scores)
    width, base = 96 + STEP * len(moves), TOP + SPAN + 8
    shown = [f"{letter} {move:+.2f}" for letter, move in zip("ABCDEFGHIJ", moves, strict=False)]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {base + SPAN + 14}" role="img" '
        f'font-family="sans-serif" font-size="11" fill="{GREY}">',
        f"<title>Where one step of {name} moves each score: {', '.join(shown)}</title>",
        *(text(8, y, word, "start") for y, word in ((18, "document"), (34, "student"), (50, "teacher"))),
        text(8, base - 4, "up", "start"),
        text(8, base + 14, "down", "start"),
        f'<line x1="88" y1="{base}" x2="{width - 4}" y2="{base}" stroke="{GREY}"/>',
    ]
    for place, move in enumerate(moves):
        x, height = 96 + STEP * place, abs(move) * SPAN
        judged, own = place == 2, place < 6
        label = "ABCDEFGHIJ"[place] + (" ✓" if judged else "")
        lines.append(text(x + 20, 18, label, "middle", f'font-weight="bold" fill="{BLUE if judged else GREY}"'))
        lines.append(text(x + 20, 34, f"{scores[0, place]:.2f}"))
        lines.append(text(x + 20, 50, f"{LOGITS[0, place]:+.1f}" if own else "other"))
        y = base - height if move > 0 else base
        size = f'x="{x}" y="{y:.1f}" width="40" height="{max(height, 0.5):.1f}"'
        lines.append(f'<rect {size} fill="{BLUE if move > 0 else ORANGE}"/>')
        lines.append(text(x + 20, (y - 4) if move > 0 else (y + height + 12), f"{move:+.2f}"))
    return "\n".join([*lines, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, anchor: str = "middle", more: str = "") -> str:
    """Return words at a place of the picture."""
    return f'<text x="{x:.0f}" y="{y:.1f}" text-anchor="{anchor}"{" " + more if more else ""}>{words}</text>'


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in PICTURES:
        (FOLDER / f"{name}.svg").write_text(svg(name), encoding="utf-8")
