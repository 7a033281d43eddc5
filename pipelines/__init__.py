"""Ray Data jobs: raw images and pairs in, DIM-T2I and DIM-Edit shards out."""
