"""`python -m moetrain`."""

from moetrain.cli.app import main

if __name__ == "__main__":
    main()
