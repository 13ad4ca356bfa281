"""`import loraq.transformers` teaches transformers to load quantized folders: language models too.

`import loraq.diffusers` does this as well.
"""

from loraq.errors import MissingLibraryError

try:
    from loraq.integrations.config import LoraqConfig
    from loraq.integrations.hf_quantizer import register
except ImportError as error:
    raise MissingLibraryError(
        f'transformers cannot be imported ({error}). Run: pip install "loraq[diffusers]"'
    ) from error

register()

__all__ = ["LoraqConfig"]
