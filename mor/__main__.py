"""`python -m mor` is the `mor` command."""

from mor.cli import app

if __name__ == "__main__":
    app(prog_name="mor")
