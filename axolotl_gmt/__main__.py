"""``gmt-tools`` and ``python -m axolotl_gmt``: the commands of ``axolotl gmt``, without Axolotl."""

import sys


def main() -> None:
    """Run the command of ``sys.argv``; the way in of the program ``gmt-tools``."""
    try:
        from axolotl_gmt.cli import gmt

        gmt(prog_name="python -m axolotl_gmt" if sys.argv[0] == __file__ else "gmt-tools")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
