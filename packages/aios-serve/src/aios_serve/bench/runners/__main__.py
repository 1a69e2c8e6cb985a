"""`python -I path/to/runners/__main__.py MODULE [ARGUMENTS]`: runs `main` of a module in this folder.

Executed by path, because the peer's environment does not know AIOS. `-I` keeps this folder off `sys.path`, where its
files could be taken for a peer's; it becomes the package `runners` instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path


def main(module: str, *arguments: str) -> None:
    """Make the folder a package, and run."""
    folder = Path(__file__).parent
    spec = importlib.util.spec_from_file_location(
        "runners", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    sys.modules["runners"] = importlib.util.module_from_spec(spec)
    importlib.import_module(f"runners.{module}").main(*arguments)


if __name__ == "__main__":
    main(*sys.argv[1:])
