"""``python -m axolotl_gmt``: the commands of ``axolotl gmt``, for whoever has no Axolotl."""

import sys

if __name__ == "__main__":
    try:
        from axolotl_gmt.cli import gmt

        gmt(prog_name="python -m axolotl_gmt")
    except KeyboardInterrupt:
        sys.exit(130)
