"""The modules of a user's own that a run needs where its clients are: shipped to a Ray cluster, and within an exported app."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

from hetfl import registry
from hetfl.config import RunOptions


def find_own_modules(options: RunOptions) -> list[Path]:
    """The files and packages of the modules that the run names as `module:name`, with what they import from beside them.

    What is installed is not among them: every node is to have it.
    """
    named = [options.model or "", *(e.plugin for e in registry.choose_entries(options) if e.source == e.plugin.partition(":")[0])]
    wanted = [name.partition(":")[0].split(".")[0] for name in named if ":" in name]
    beside = {path.parent for path in map(find_module, wanted) if path is not None}
    loaded = {name.split(".")[0] for name in sys.modules}
    return sorted({path for path in map(find_module, loaded) if path is not None and path.parent in beside})


def find_module(name: str) -> Path | None:
    """The file or folder of an imported top-level module that is neither installed nor hetfl's."""
    module = sys.modules.get(name)
    places = [*getattr(module, "__path__", ()), *([file] if (file := getattr(module, "__file__", None)) else [])]
    if not places or name == "hetfl":
        return None
    path = Path(places[0]).resolve()
    installed = [Path(sysconfig.get_path(kind)).resolve() for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    ours = path.stem == name and (path.is_dir() or path.suffix == ".py")
    return path if ours and not any(path.is_relative_to(place) for place in installed) else None
