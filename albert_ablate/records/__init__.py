"""The run folder: written by a run, read by everything else. No torch from here on.

runs/<setting>/seed<N>/ holds config.yaml, record.json, the histories steps, evals and layers, and checkpoints/.
"""
