"""Where gradients live. The only room that knows DTensor and DeepSpeed's optimizers.

It hands out flat views of a process's own entries and sums over ranks; it knows nothing of masks,
thresholds or trainers. ``shard`` has what each source of gradients owes, ``plain`` and ``zero`` are
the two sources, ``of_optimizer`` chooses between them and imports the one that is needed.
"""
