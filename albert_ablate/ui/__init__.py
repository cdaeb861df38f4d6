"""`albert-ablate ui`: the report as a page of this machine that follows its runs."""
