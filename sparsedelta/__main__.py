"""Run the command line with ``python -m sparsedelta``."""

from sparsedelta.cli import main

if __name__ == "__main__":
    main()
