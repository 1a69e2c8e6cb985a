"""`python -m aios_serve` is `aios-serve`, for launchers that start modules, such as torchrun."""

from __future__ import annotations

from aios_serve.cli import main

if __name__ == "__main__":
    main()
