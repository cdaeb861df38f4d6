"""Run folders: written by training, read by everything else. No torch in this package.

runs/<setting>/seed<N>/ holds config.yaml, record.json, the histories steps, evals and layers, and checkpoints/.
"""
