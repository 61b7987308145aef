"""The fitter: the ledger of records, the fit, and the group commit (numpy only)."""
