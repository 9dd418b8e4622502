"""An extension for the reference: losses as they are when they run, with the options that `spelled_out` gives them."""

from __future__ import annotations

import inspect
from typing import Any

import griffe


class SpelledOut(griffe.Extension):
    """Takes docstring and signature of a loss from the class itself, which knows its parents' options, too."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Name the section of examples as griffe wants it, which else takes their lists for links."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("\nExample:\n", "\nExamples:\n")

    def on_class(self, *, cls: griffe.Class, **kwargs: Any) -> None:
        """Replace what was read in the source; other classes stay."""
        if not cls.path.startswith(("st_wkl.losses.", "st_wkl.methods.")) or cls.docstring is None:
            return
        kind = griffe.dynamic_import(cls.path)
        cls.docstring.value = (inspect.getdoc(kind) or "").replace("\nExample:\n", "\nExamples:\n")
        entries = [
            griffe.Parameter(
                entry.name,
                annotation=entry.annotation if isinstance(entry.annotation, str) else None,
                kind=griffe.ParameterKind[entry.kind.name.lower()],
                default=None if entry.default is entry.empty else repr(entry.default),
            )
            for entry in inspect.signature(kind.__init__).parameters.values()
        ]
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(*entries), parent=cls))
