"""`python -m emt` is the `emt` command."""

from emt.cli import main

if __name__ == "__main__":
    main()
