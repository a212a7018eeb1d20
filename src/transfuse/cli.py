"""The `transfuse` command: a thin layer over the library. Each command imports only what it needs."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from .core.errors import BadInput, TransfuseError

__all__ = ["app", "main"]

app = typer.Typer(
    name="transfuse",
    help="Move knowledge between models and documents, and measure what moved.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe.", show_default=False)]
Slug = Annotated[
    str, typer.Argument(metavar="SLUG", help="The method, ck-plug or ck_plug.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the results.")]


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and stop.")] = False,
) -> None:
    if version:
        from . import __version__

        print(__version__)
        raise typer.Exit


@app.command()
def methods(
    family: Annotated[str | None, typer.Option("--family", "-f", help="Only this family.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the methods: what moves, what access they need, what was measured."""
    from . import catalogue

    found = catalogue.methods(family)
    if as_json:
        print(json.dumps([method.describe() for method in found], indent=2, ensure_ascii=False))
        return
    rows = []
    for method in found:
        evidence = method.evidence
        verdicts = " / ".join(evidence[tier] for tier in catalogue.TIERS)
        access = ", ".join(method.access)
        rows.append(
            (method.slug, method.family, method.arxiv or "", access, verdicts, method.moves, method.title)
        )
    _table(("slug", "family", "arXiv", "access", "evidence: quick / full", "moves", "title"), rows)


@app.command()
def show(
    slug: Slug,
    yaml: Annotated[bool, typer.Option("--yaml", help="Print a recipe with the defaults.")] = False,
) -> None:
    """Explain one method: what it needs, how it is called, what was measured."""
    from . import explain

    print(explain.recipe(slug) if yaml else explain.page(slug))


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the reference models: size, licence, origin, whether they are in the cache."""
    from .core.references import REFERENCES, cached_folder

    found: list[dict[str, Any]] = []
    for name, reference in REFERENCES.items():
        folder = cached_folder(name)
        found.append(
            {
                "name": name,
                "task": reference.task,
                "parameters": reference.parameters,
                "download_bytes": reference.download_bytes,
                "licence": reference.licence,
                "origin": reference.origin,
                "hub": reference.hub,
                "packages": [f"{wheel.name}=={wheel.version}" for wheel in reference.wheels],
                "cached": str(folder) if folder.is_dir() else None,
            }
        )
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows = [
        (
            model["name"],
            model["task"],
            f"{model['parameters'] / 1e6:.0f} M",
            f"{model['download_bytes'] / 1e6:.0f} MB",
            model["licence"],
            model["cached"] or "not yet",
            model["origin"],
        )
        for model in found
    ]
    _table(("name", "task", "parameters", "download", "licence", "in the cache", "origin"), rows)


@app.command()
def datasets(as_json: AsJson = False) -> None:
    """List the data sets that are known by name: licence, size, where they are."""
    from .core.datasets import datasets_table

    found = datasets_table()
    if as_json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    elif found:
        _table(tuple(found[0]), [tuple(row.values()) for row in found])


@app.command()
def evidence(
    slug: Slug,
    full: Annotated[bool, typer.Option("--full", help="The full tier: up to an hour on a CPU.")] = False,
    seeds: Annotated[int | None, typer.Option(help="Number of seeds.", min=1)] = None,
) -> None:
    """Measure a paper's claim again and write the record."""
    from .core.evidence import run_evidence

    run_evidence(slug, "full" if full else "quick", seeds)


@app.command()
def run(recipe: Recipe, output: Output = None) -> None:
    """Run one transfer and write a loadable folder; run again to resume."""
    from .recipe import run as run_recipe

    folder = run_recipe(recipe, output=output)
    if (folder / "training.json").is_file() and importlib.util.find_spec("matplotlib") is not None:
        from .report import write_losses

        write_losses(folder)


@app.command()
def merge(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG.yml", help="Ours, or mergekit's.", show_default=False)
    ],
    output: Output = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, write nothing.")] = False,
) -> None:
    """Merge fine-tunes of one model into a folder that loads: linear, slerp, task arithmetic, TIES, DARE."""
    from .merge import merge as run_merge
    from .merge import read_config

    given = read_config(config)
    named = given.pop("output", None)
    target = output or named
    if target is None and not dry_run:
        raise BadInput("--output", None, "is missing", "give a new folder for the result")
    made = run_merge(**given, output=target, dry_run=dry_run)
    print(made if dry_run else f"written to {made}")


@app.command()
def compare(recipe: Recipe, output: Output = None) -> None:
    """Try several ways to give a model some knowledge, side by side; run again to resume."""
    from .compare import compare as run_comparison

    run_comparison(recipe, output=output)


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from .schema import recipe_schema

    print(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        arguments: The words after `transfuse`; those of the process by default.

    Returns:
        0; 2 after an error, told in one line (raised if TRANSFUSE_DEBUG=1); 130 after an interruption, 143 after
        SIGTERM, which is taken as one; 141 where nobody read the output to its end, as the shell has it.
    """
    with _terminable() as terminated, warnings.catch_warnings():
        warnings.showwarning = _show_warning
        code = _called(arguments)
    return 143 if terminated and code == 130 else code


@contextlib.contextmanager
def _terminable() -> Iterator[list[int]]:
    """Turn SIGTERM into an interruption, so that unfinished folders are removed; yields the signals that came."""
    came: list[int] = []
    owner = os.getpid()
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    ):
        yield came
        return

    def interrupt(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL if os.getpid() != owner else signal.SIG_IGN)
        if os.getpid() != owner:  # a fork has nothing to tidy up
            os.kill(os.getpid(), number)
            return
        came.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _called(arguments: Sequence[str] | None) -> int:
    debug = os.environ.get("TRANSFUSE_DEBUG") == "1"
    words = sys.argv[1:] if arguments is None else list(arguments)
    try:
        code = app(args=words, standalone_mode=False)
        sys.stdout.flush()
        if code == 130:  # how typer passes an interruption on; older versions raise Abort
            return _interrupted(words)
        return code if isinstance(code, int) else 0
    except KeyboardInterrupt:
        return _interrupted(words)
    except (BrokenPipeError, SystemExit) as error:  # `transfuse methods | head`; typer makes an exit of it
        if not isinstance(error, BrokenPipeError) and not isinstance(error.__context__, BrokenPipeError):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except TransfuseError as error:
        if debug:
            raise
        return _fail(str(error), error.exit_code)
    except Exception as error:
        if type(error).__name__ == "Abort":
            return _interrupted(words)
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error)
            return 2
        message = getattr(error, "format_message", None)  # typer's usage errors
        if message is None:
            raise
        return _fail(message(), getattr(error, "exit_code", 2))


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


def _interrupted(words: Sequence[str]) -> int:
    if {"compare", "run"} & set(words[:1]):
        kept = "what was finished is kept; the same command goes on from there"
    else:
        kept = "nothing was written; the same command starts over"
    print("interrupted: " + kept, file=sys.stderr)
    return 130


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    print("warning: " + " ".join(str(message).split()), file=sys.stderr)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print aligned columns; on a terminal, lines are cut at its width."""
    import shutil

    lines = [tuple(str(cell) if cell is not None else "" for cell in row) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in lines:
        text = "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        print(text if room is None or len(text) <= room else text[: room - 1] + "…")
