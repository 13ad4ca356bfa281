"""`import loraq.diffusers` teaches diffusers to load quantized folders, and PEFT to adapt them.

It teaches transformers too, of which the text encoders of pipelines are, where it is installed.
Nothing else of loraq touches these libraries: `import loraq` alone leaves them as they are.
"""

from importlib.util import find_spec
from logging import getLogger

from loraq.errors import LoraqError, MissingLibraryError

try:
    from loraq.integrations.config import LoraqConfig
    from loraq.integrations.quantizer import register
except ImportError as error:
    raise MissingLibraryError(
        f'diffusers cannot be imported ({error}). Run: pip install "loraq[diffusers]"'
    ) from error

register()
if find_spec("transformers"):
    try:
        import loraq.transformers  # noqa: F401 (imported for what it does)
    except LoraqError as error:  # what diffusers loads itself does not need it
        getLogger("loraq").warning("Text encoders of transformers are not served: %s", error)
if find_spec("peft"):
    from loraq.integrations.adapters import register_adapters

    register_adapters()

__all__ = ["LoraqConfig"]
