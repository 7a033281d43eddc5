"""Models in files: DIM folders, and the published checkpoints in and out."""
