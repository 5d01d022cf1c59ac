"""``python -m ffpretrain.zoo add NAME FILE``: put a model into the package, for those who maintain it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from ffpretrain.errors import UserError
from ffpretrain.zoo import register_model


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0, or 2 with one line on stderr on bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m ffpretrain.zoo", description="Maintain the named models."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    add = verbs.add_parser("add", help="copy a model file into the package and enter its SHA-256")
    add.add_argument("name")
    add.add_argument("file")
    options = parser.parse_args(arguments)
    try:
        entry = register_model(options.name, options.file)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{options.name}: {entry.file}, SHA-256 {entry.sha256}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
