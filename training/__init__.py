"""Training on Ray Train: the stages t2i, edit1 and edit2 over one loop."""
