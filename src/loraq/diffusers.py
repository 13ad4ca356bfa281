"""`import loraq.diffusers` teaches diffusers to load quantized folders, and PEFT to adapt them.

Nothing else of loraq touches diffusers: `import loraq` alone leaves it as it is.
"""

from importlib.util import find_spec

from loraq.integrations.quantizer import LoraqConfig, register

register()
if find_spec("peft"):
    from loraq.integrations.adapters import register_adapters

    register_adapters()

__all__ = ["LoraqConfig"]
