"""The pre-registered study on two-digit sums, see ``benchmarks/study/PLAN.md``."""
