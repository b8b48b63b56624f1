#!/usr/bin/env python
"""The tool of the book: `python nbs/_book/book.py COMMAND`.

    export [NAME...]    write the package from the chapters
    run [NAME...]       run chapters, each in a fresh process, and save their outputs
    clean [NAME...]     bring notebooks to their clean form without running them
    check [--fresh]     everything that must hold of the book
    readme              write README.md from the index
    render [--draft]    the site, into _docs/
"""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])  # nbs/, where `_book` is a package, in place of this folder

from _book import notebooks  # noqa: E402


def cmd_export(book: notebooks.Book, args: argparse.Namespace) -> int:
    from _book.exporting import export

    changed = export(book, args.names)
    print("\n".join(f"wrote {name}" for name in changed) or "the package is as the chapters say")
    return 0


def cmd_run(book: notebooks.Book, args: argparse.Namespace) -> int:
    from _book.running import TIMEOUT, run

    results = run(book, args.names, args.slow, not args.no_save, args.jobs, args.timeout or TIMEOUT)
    failed = [result for result in results if result.error]
    for result in failed:
        print(f"\n{result.error}", file=sys.stderr)
    return bool(failed)


def cmd_clean(book: notebooks.Book, args: argparse.Namespace) -> int:
    changed = notebooks.clean(book.chosen(args.names))
    print("\n".join(f"cleaned {path.parent.name}/{path.name}" for path in changed) or "all clean")
    return 0


def cmd_check(book: notebooks.Book, args: argparse.Namespace) -> int:
    from _book.checking import check

    found = check(book, fresh=args.fresh, only=args.rules)
    for rule, problems in found.items():
        print(f"{'ok' if not problems else 'NO':<3} {rule}")
        for problem in problems:
            print(f"      {problem}")
    return any(found.values())


def cmd_readme(book: notebooks.Book, args: argparse.Namespace) -> int:
    from _book.readme import write

    changed = write(book)
    print("wrote " + ", ".join(changed) if changed else "README.md is as the index says")
    return 0


def cmd_render(book: notebooks.Book, args: argparse.Namespace) -> int:
    from _book.rendering import render

    page = render(book, args.output or book.root / book.settings["doc_path"], args.draft)
    print(f"the site is at {page}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    root = argparse.ArgumentParser(prog="book.py", description="Export, run, check and render the book.")
    root.add_argument("--root", type=Path, help="the checkout (default: the one this file stands in)")
    commands = root.add_subparsers(dest="command", required=True)

    def add(name: str, what: str, names: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what)
        if names:
            command.add_argument("names", nargs="*", help="notebooks or parts, such as 02_store, worlds/alfworld, memory (default: all)")
        return command

    add("export", "Write the package from the chapters.", names=True)
    command = add("run", "Run chapters in fresh processes; save the outputs of those that pass.", names=True)
    command.add_argument("--slow", action="store_true", help="also run cells flagged `#| slow`")
    command.add_argument("--no-save", action="store_true", help="only test; write nothing")
    command.add_argument("--jobs", type=int, default=1, help="chapters at once (default: 1)")
    command.add_argument("--timeout", type=float, help="seconds for a chapter (default: 900)")
    add("clean", "Bring notebooks to their clean form without running them.", names=True)
    command = add("check", "Check everything that must hold of the book.")
    command.add_argument("--fresh", action="store_true", help="also run every chapter and compare its saved outputs")
    command.add_argument("--rules", nargs="*", help="only these rules")
    add("readme", "Write README.md from nbs/index.ipynb.")
    command = add("render", "Build the site; warnings are errors.")
    command.add_argument("--output", type=Path, help="where to (default: _docs/)")
    command.add_argument("--draft", action="store_true", help="only say what is wrong, and build all the same")
    return root


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        book = notebooks.Book.find(args.root)
        return int(globals()[f"cmd_{args.command}"](book, args))
    except notebooks.BookError as error:
        print(f"book.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
