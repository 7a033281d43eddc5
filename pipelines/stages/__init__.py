"""What the jobs do to a batch: small callables from Arrow table to Arrow table, free of Ray."""
