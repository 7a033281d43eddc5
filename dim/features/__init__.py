"""What the frozen parts say about a sample: computed, kept in files, and read again."""
