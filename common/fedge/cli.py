"""What the three commands share: exit codes, one clear line for a user's mistake, help with examples."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence

from fedge.errors import FedgeError

Command = Callable[[argparse.Namespace], int]
"""Does one subcommand's work and returns the exit code: 0 done, 1 the work failed."""


def parser(name: str, description: str, examples: str) -> argparse.ArgumentParser:
    """A parser whose --help ends with examples."""
    import fedge

    made = argparse.ArgumentParser(
        prog=name,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--version", action="version", version=f"{name} {fedge.__version__}")
    return made


def subcommand(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Command,
    *,
    summary: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Add a subcommand; `summary` is its line in the list and the head of its own --help."""
    made = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(run=run)
    return made


def run(arguments: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> int:
    """Parse, do the work, and turn what fedge raises on purpose into one line and an exit code."""
    parsed = arguments.parse_args(argv)  # argparse itself exits with 2 on a wrong command line
    try:
        return int(parsed.run(parsed))
    except FedgeError as error:
        print(f"{arguments.prog}: error: {error}", file=sys.stderr)  # noqa: T201
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{arguments.prog}: interrupted", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nothing is left to say
        return 1
    except OSError as error:
        if error.filename is None or error.strerror is None:
            raise  # no file that somebody could look at: a fault of ours
        print(f"{arguments.prog}: error: {error.filename}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 1
