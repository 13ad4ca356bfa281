"""Pages for people: one self-contained HTML file each, readable on a phone, without a network."""
