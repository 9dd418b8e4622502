"""Model cards from the results file, dataset cards from the provenance, and the licence that follows."""

from __future__ import annotations

from st_wkl.cards.licences import Licence, licence_of
from st_wkl.cards.model_card import write_model_card

__all__ = ["Licence", "licence_of", "write_model_card"]
