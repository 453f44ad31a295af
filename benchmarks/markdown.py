"""Tables of the benchmarks."""

from collections.abc import Iterable, Sequence


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a Markdown table, each row as soon as it is known, and an empty line."""
    for cells in (columns, ["---"] * len(columns)):
        print("| " + " | ".join(cells) + " |", flush=True)
    for cells in rows:
        print("| " + " | ".join(cells) + " |", flush=True)
    print(flush=True)
