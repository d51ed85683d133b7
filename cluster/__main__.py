"""`python -m cluster`, and the `motley` script."""

from __future__ import annotations

from cluster.cli import app


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
