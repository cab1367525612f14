"""`python -m lightning_unfreeze` is the console script `lightning-unfreeze`."""

from lightning_unfreeze.cli import main

if __name__ == "__main__":
    main()
