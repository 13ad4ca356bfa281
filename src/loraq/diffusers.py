"""`import loraq.diffusers` makes quantized folders load with diffusers' own `from_pretrained`, and LoRA work on them.

Nothing else of loraq touches diffusers: `import loraq` alone leaves it as it is.
"""

from importlib.util import find_spec

from loraq.integrations.quantizer import LoraqConfig, register

register()
if find_spec("peft"):
    from loraq.integrations.adapters import register_adapters

    register_adapters()

__all__ = ["LoraqConfig"]
