"""Putting it together: one weight, a module in place, a folder to a folder."""
