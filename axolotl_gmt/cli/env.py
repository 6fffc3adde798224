"""The command ``env``."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING

import click

from axolotl_gmt.cli.console import PlainConsole, remarks

if TYPE_CHECKING:
    from axolotl_gmt.tools.environment import Device


@click.command()
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print a JSON object as the last line, after Axolotl's logo.",
)
def env(as_json: bool) -> None:
    """Print what a report of a bug needs: versions, devices, and how masks are made on them.

    Where there are compiled passes, they are compared with torch's on each type of device. If they
    differ or cannot be compiled, torch's run, slower, and the reason is shown.

    Nothing private is printed: no path, no name of a user or a host, no variable of the
    environment. Without Axolotl's logo: gmt-tools env.

    \b
    Examples:
      axolotl gmt env
      axolotl gmt env --json | tail -n 1
    """  # noqa: D301
    remarks.print("Looking at this machine. The first time takes longer, to compile mask passes.")
    from axolotl_gmt.tools.environment import environment

    found = environment()
    if as_json:
        click.echo(json.dumps(found.as_dict()))
        return
    rows = [(package, number or "not installed") for package, number in found.versions.items()]
    rows.append(("system", f"{found.system}, {found.cores} cores"))
    for device in found.devices:
        rows += [(device.name, _facts(device)), ("", _masks(device))]
    console = PlainConsole(soft_wrap=True)
    width = max(len(label) for label, _ in rows) + 2
    for label, value in rows:
        console.print(f"{label:<{width}}{value}")


def _facts(device: Device) -> str:
    facts = [device.model]
    if device.memory is not None:
        facts.append(f"{device.memory / 2**30:.1f} GiB")
    if device.capability is not None:
        facts.append(f"capability {device.capability}")
    return ", ".join(facts)


def _masks(device: Device) -> str:
    if not device.passes:
        return f"no masks: {device.error}"
    dtypes = defaultdict(list)
    for dtype, backend in device.passes.items():
        dtypes[backend].append(dtype)
    parts = [
        f"{', '.join(of_backend)} masked by {backend}"
        + ("" if backend == "torch" else ", self-check passed")
        for backend, of_backend in dtypes.items()
    ]
    if device.error:
        parts.append(f"compiled passes cannot be used ({device.error})")
    return "; ".join(parts)
