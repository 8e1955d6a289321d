"""Entry point of the `kdfast` command: `kdfast distill`, `kdfast methods [slug]`, `kdfast cache-teacher`, `kdfast doctor [--bench]`."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; without the train extra, which brings typer and rich, one line says what to install."""
    try:
        from kdfast.commands import app
    except ImportError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(
            f"kdfast: the command line needs the 'train' extra ({error}): pip install 'kdfast[train]'", file=sys.stderr
        )
        raise SystemExit(1) from None
    app(arguments)


if __name__ == "__main__":
    main()
