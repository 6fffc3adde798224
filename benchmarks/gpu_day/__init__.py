"""Everything for a first day on a GPU, as one command: ``python -m benchmarks.gpu_day --out DIR``.

``parts`` says what is run and what it should show, ``day`` runs it and ``record`` is
what it leaves. The child processes run the other modules, and the benchmarks beside this folder.
"""
