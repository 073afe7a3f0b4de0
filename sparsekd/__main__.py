"""`python -m sparsekd`, for torchrun's -m."""

from sparsekd.cli import main

if __name__ == "__main__":
    main()
