"""`python -m peftfx.cli`: the command line."""

from peftfx.cli.main import main

if __name__ == "__main__":
    main()
