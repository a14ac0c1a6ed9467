"""Where the repository, its docs and the real data sets are."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]

DOCS = ROOT / "docs"

REAL = Path(os.environ.get("HETFL_DATA") or ROOT.parent / "shared" / "data")
