"""Safetensors files, written and read: one parser for models, statistics and LoRAs."""
