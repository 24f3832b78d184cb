"""`python -m hf_continual`."""

from hf_continual.cli import main

if __name__ == "__main__":
    main()
