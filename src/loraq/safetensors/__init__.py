"""The safetensors files that loraq reads and writes: one parser for models, statistics and LoRAs."""
