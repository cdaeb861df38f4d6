"""Claims and records in, a ledger of verdicts out."""
