"""Images from folders, their labels, and loaders that know their place. Names are imported when they are first used."""

from importlib import import_module
from typing import Any

_ROOM_OF = {"DigitsData": "digits", "ImageFolderData": "modules", "decode": "images"}


def __getattr__(name: str) -> Any:
    """Imports a public name on first use (PEP 562): `data.loaders` and `data.datasets` need no Lightning."""
    name = {"_decode": "decode"}.get(name, name)  # its name in 0.1.0
    if name not in _ROOM_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(_ROOM_OF)}")
    return getattr(import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
