"""Where the applications run and what they stand on: object storage, tracking, clusters."""
