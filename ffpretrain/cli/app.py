"""The frame of the command line: the table of verbs and the group that loads each one when it is called.

``ffpretrain --help`` prints the table below and imports neither torch nor ASE nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any, NamedTuple

import typer
import typer.core
import typer.main

from ffpretrain._version import __version__


class Verb(NamedTuple):
    """Where a verb is implemented and what the overview says about it.

    Attributes:
        module: the module to import when the verb is called.
        attribute: in it, a function to turn into a command, or a ``typer.Typer`` with commands of its own.
        help: one line for the overview.
    """

    module: str
    attribute: str
    help: str


VERBS: dict[str, Verb] = {
    "demo": Verb("ffpretrain.cli.demo", "demo", "Pretrain, fine-tune, evaluate and run a small model."),
    "models": Verb("ffpretrain.cli.models", "models", "List the named models that come with the package."),
    "train": Verb("ffpretrain.cli.train", "train", "Train a model from a recipe, from scratch or further."),
    "evaluate": Verb("ffpretrain.cli.evaluate", "evaluate", "Measure a model's errors on labelled frames."),
    "md": Verb("ffpretrain.cli.md", "md", "Run molecular dynamics with a model."),
    "export": Verb("ffpretrain.cli.export", "export", "Write a model as a file for another program."),
    "import": Verb("ffpretrain.cli.import_", "import_", "Make a model of another program's checkpoint."),
    "validate": Verb("ffpretrain.cli.validate", "validate", "Examine how far a model can be trusted."),
    "landscape": Verb("ffpretrain.cli.landscape", "landscape", "Draw energies on a plane or along scans."),
    "report": Verb("ffpretrain.cli.report", "report", "Write one HTML page about a model or a run."),
    "label": Verb("ffpretrain.cli.label", "label", "Sample geometries and label them with a QM engine."),
    "data": Verb("ffpretrain.cli.data", "app", "Inspect, check, convert, split and download datasets."),
    "doctor": Verb("ffpretrain.cli.doctor", "doctor", "Report versions, devices, compiler and packages."),
}


class LazyVerb(typer.core.TyperCommand):
    """A command that is one line in the overview until it is called; then the real one is imported."""

    def __init__(self, name: str, verb: Verb) -> None:
        super().__init__(name=name, help=verb.help)
        self.verb = verb

    def load(self) -> Any:
        """Import the verb's module and return its command."""
        target = getattr(importlib.import_module(self.verb.module), self.verb.attribute)
        if not isinstance(target, typer.Typer):
            single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
            single.command(self.name)(target)
            target = single
        return typer.main.get_command(target)

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        """Return the context of the real command, which the group then invokes."""
        return self.load().make_context(info_name, args, parent=parent, **extra)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ffpretrain {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Force fields that learn from noise and from labels."""


def build_command() -> typer.core.TyperGroup:
    """Return the ``ffpretrain`` command with every verb of the table mounted, none of them imported."""
    app = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    group = typer.main.get_command(app)
    if not isinstance(group, typer.core.TyperGroup):
        raise TypeError("the root of the command line is not a group")
    for name, verb in VERBS.items():
        group.add_command(LazyVerb(name, verb), name)
    return group
