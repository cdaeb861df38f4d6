"""From run records to verdicts. Imports nothing heavy: no torch, and scipy only inside functions."""
