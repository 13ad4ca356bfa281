"""`python -m loraq`: the command line."""

from loraq.cli import main

if __name__ == "__main__":
    main()
