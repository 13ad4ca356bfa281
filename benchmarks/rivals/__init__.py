"""The same weights in the hands of other packages."""
