"""The commands that need nothing but the method itself."""
