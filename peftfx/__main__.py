"""The command line, as `python -m peftfx`."""

from peftfx.cli.main import main

if __name__ == "__main__":
    main()
