"""`python -m abliterator`."""

from abliterator.cli import main

if __name__ == "__main__":
    main()
