"""Model cards from the results file."""

from __future__ import annotations

from st_wkl.cards.model_card import write_model_card

__all__ = ["write_model_card"]
