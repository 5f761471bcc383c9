"""`python -m karla_hf` is the command `karla`, also for torchrun."""

from karla_hf.cli import main


if __name__ == "__main__":
    main()
