"""What others run: quantized folders as files of other programs.

`run` is the entry, `table` lists the targets; each target is a file of its own.
"""
