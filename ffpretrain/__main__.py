"""``python -m ffpretrain`` is the ``ffpretrain`` command."""

from ffpretrain.cli import main

if __name__ == "__main__":
    main()
