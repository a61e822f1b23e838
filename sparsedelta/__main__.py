"""``python -m sparsedelta``: the command line."""

from sparsedelta.cli import main

if __name__ == "__main__":
    main()
