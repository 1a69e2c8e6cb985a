"""`python -m aios_serve`, which is how torchrun starts `aios-serve`."""

from aios_serve.cli import main

if __name__ == "__main__":
    main()
