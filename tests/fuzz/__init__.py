"""Every reader against mutated files: `python -m tests.fuzz`, or `make fuzz`.

An input is a folder of small valid files, of which one or two are mutated where it hurts: a value
in a JSON tree is replaced by one of another type or size, a key is deleted, renamed or written
twice, offsets are swapped, bits flipped, a file cut or replaced by a pipe. A reader may refuse it
with one `LoraqError`, at once and in one line, or accept it if what it returns can be justified.
Everything follows from (reader, seed, index).
"""
