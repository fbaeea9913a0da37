"""Run the command line by `python -m peftfx.cli`."""

from peftfx.cli.main import main

if __name__ == "__main__":
    main()
