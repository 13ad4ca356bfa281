"""How near a quantized weight, layer or model stays to what it was."""
