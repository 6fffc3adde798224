"""``python -m axolotl_gmt``: the commands of ``axolotl gmt``, for whoever has no Axolotl."""

from axolotl_gmt.cli import gmt

gmt(prog_name="python -m axolotl_gmt")
