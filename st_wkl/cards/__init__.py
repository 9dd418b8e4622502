"""The cards are in `st_wkl.publish`; this name stays for one release."""

from __future__ import annotations

from st_wkl.publish.licences import Licence, licence_of
from st_wkl.publish.model_card import write_model_card

__all__ = ["Licence", "licence_of", "write_model_card"]
