"""Does GMT pay? A grid of methods, trained and scored: ``python -m benchmarks.study``.

Every cell of the grid is an ordinary Axolotl run from a YAML file in the cell's folder.
"""
