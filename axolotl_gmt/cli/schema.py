"""The command ``schema``."""

from __future__ import annotations

import json

import click

from axolotl_gmt.cli.console import remarks, require_axolotl


@click.command()
@click.option(
    "--axolotl", "whole", is_flag=True, help="Of all keys of Axolotl, the gmt_* ones too."
)
def schema(whole: bool) -> None:
    """Print the JSON schema of the gmt_* keys of a YAML file, for editors that complete them.

    It has each key's type, range, default and meaning. One line on stdout, the last after Axolotl's
    logo; gmt-tools schema prints it alone.

    In an editor with the YAML language server, such as VS Code with the extension YAML of Red Hat,
    the first line of a config can then be

    \b
      # yaml-language-server: $schema=gmt.schema.json

    \b
    Examples:
      gmt-tools schema > gmt.schema.json
      gmt-tools schema --axolotl > axolotl.schema.json
    """  # noqa: D301
    if whole:
        require_axolotl()
        remarks.print("Importing Axolotl, which takes some seconds.")
    from axolotl_gmt.tools.check.schema import axolotl_schema, gmt_schema

    click.echo(json.dumps(axolotl_schema() if whole else gmt_schema()))
