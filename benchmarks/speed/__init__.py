"""How fast layers, blocks, the solver and whole models are."""
