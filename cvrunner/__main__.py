"""`python -m cvrunner`."""

from cvrunner.cli import main

if __name__ == "__main__":
    main()
