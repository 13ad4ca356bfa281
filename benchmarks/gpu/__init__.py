"""What one command measures on a GPU: `make gpu`."""
