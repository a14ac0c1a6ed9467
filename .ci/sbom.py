"""A software bill of materials: `python .ci/sbom.py > sbom.json` writes hetfl and all that it needs here, as CycloneDX 1.5."""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from typing import Any

from packaging.requirements import Requirement


def main() -> None:
    """Prints the components in the order of their names: the same environment gives the same text."""
    found = collect("hetfl", {}, set(sys.argv[1:]))
    parts = [component(found[name]) for name in sorted(found) if name != "hetfl"]
    own = component(found["hetfl"]) | {"type": "application"}
    text = {"bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1, "metadata": {"component": own}, "components": parts}
    sys.stdout.write(json.dumps(text, indent=1) + "\n")


def collect(name: str, found: dict[str, Distribution], extras: set[str]) -> dict[str, Distribution]:
    """The distribution `name` with what it requires under `extras` (hetfl's, such as ray), by normal names, added to `found`."""
    of = distribution(name)
    known, found[normal(name)] = normal(name) in found, of
    for line in of.requires or []:
        need = Requirement(line)
        plain = need.marker is None or need.marker.evaluate({"extra": ""})
        more = not plain and need.marker is not None and any(need.marker.evaluate({"extra": extra}) for extra in extras)
        if not (more or (plain and not known)) or (normal(need.name) in found and not need.extras):
            continue
        try:
            collect(need.name, found, set(need.extras))
        except PackageNotFoundError:
            sys.stderr.write(f"{need.name}, which {name} requires, is not installed\n")
    return found


def component(of: Distribution) -> dict[str, Any]:
    """One component, with its licence where it says one."""
    about: Any = of.metadata
    listed = [line.rpartition(" :: ")[2] for line in about.get_all("Classifier", []) if line.startswith("License ::")]
    licence = about.get("License-Expression") or ", ".join(listed) or (about.get("License") or "").split("\n")[0][:100]
    name = normal(about["Name"])
    more = {"licenses": [{"license": {"name": licence}}]} if licence else {}
    return {"type": "library", "name": name, "version": version(name), "purl": f"pkg:pypi/{name}@{version(name)}", **more}


def normal(name: str) -> str:
    """A distribution's name as the index has it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    main()
