"""The disk: packed models as safetensors shards, with a manifest that says how to read them."""

from loraq.checkpoint.model import load_into, save

__all__ = ["load_into", "save"]
