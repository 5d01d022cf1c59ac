"""``python -m ffpretrain`` is the ``ffpretrain`` command."""

from ffpretrain.cli import run

if __name__ == "__main__":
    run()
