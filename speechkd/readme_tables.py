"""Tables of results that scripts put into a README, so that nobody types a number."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from speechkd.files import atomic_write


def parse_table_arguments(parser: ArgumentParser, argv: list[str] | None) -> Namespace:
    """Arguments of a script that makes a table, with `--readme` and `--marker`, where `show_table` puts it."""
    parser.add_argument("--readme", type=Path, help="file to put the table into")
    parser.add_argument("--marker", help="name of the place in that file")
    arguments = parser.parse_args(argv)
    if (arguments.readme is None) != (arguments.marker is None):
        parser.error("--readme and --marker, the name of the place in that file, go together")
    return arguments


def show_table(table: str, arguments: Namespace) -> None:
    """Print the table, or replace what stands between `<!-- MARKER -->` and `<!-- /MARKER -->` in the README.

    Args:
        table: Markdown.
        arguments: of `parse_table_arguments`.

    Raises:
        SystemExit: the file lacks one of the markers.
    """
    if arguments.readme is None:
        sys.stdout.write(f"{table}\n")
        return
    start, end = f"<!-- {arguments.marker} -->", f"<!-- /{arguments.marker} -->"
    content = arguments.readme.read_text(encoding="utf-8")
    if start not in content or end not in content:
        raise SystemExit(f"error: {arguments.readme} lacks {start} or {end}")
    before, rest = content.split(start)
    with atomic_write(arguments.readme) as temporary:
        temporary.write_text(f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def require_results(run_dirs: list[Path], file_name: str = "results.json") -> None:
    """Refuse run folders that were not evaluated.

    Raises:
        SystemExit: names all that lack the file.
    """
    missing = [str(run) for run in run_dirs if not (run / file_name).is_file()]
    if missing:
        raise SystemExit(f"error: no {file_name} in {', '.join(missing)}; run the evaluate stage first")
