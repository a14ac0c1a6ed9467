"""What the two halves of an exported app agree on."""

from __future__ import annotations

import sys
from pathlib import Path


def begin(half: str) -> Path:
    """The folder of an app by the path of one of its halves, its own modules importable."""
    folder = Path(half).parent
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return folder
