"""LoRA adapters: small files of changes to painter and connector, learnt, read and merged."""
