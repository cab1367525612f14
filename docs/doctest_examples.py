"""A griffe extension for the site: doctests in docstrings become sections of examples, wherever they stand."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

_BARE = re.compile(r"^>>> .*?(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)


class DoctestExamples(griffe.Extension):
    """Markdown would take `>>>` for a quotation."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Put the heading that griffe knows above each doctest."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = _BARE.sub(lambda found: f"Examples:\n{textwrap.indent(found[0], '    ')}", text)
