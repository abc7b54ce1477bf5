"""flash_attn's functions by heed: the same names, signatures, layouts and return values, on any device heed has.

The functions here and in ``flash_attn_interface`` are FlashAttention-2's, those in ``hopper`` FlashAttention-3's. After
``heed.flash_attn.install()`` code that imports ``flash_attn`` or ``flash_attn_interface`` gets them. What is honoured
and what is declined: docs/flash-attn-users.md.
"""

import sys

from .._core import InvalidArgument
from . import bert_padding, flash_attn_interface, hopper, layers
from .flash_attn_interface import (flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func,
                                   flash_attn_varlen_func, flash_attn_varlen_kvpacked_func,
                                   flash_attn_varlen_qkvpacked_func, flash_attn_with_kvcache)
from .hopper import flash_attn_combine, get_scheduler_metadata
from .layers.rotary import apply_rotary_emb, apply_rotary_emb_kv_, apply_rotary_emb_qkv_

__version__ = "2.8.4"  # of flash_attn's interface; callers ask it what they may pass

__all__ = ["apply_rotary_emb", "apply_rotary_emb_kv_", "apply_rotary_emb_qkv_", "bert_padding", "flash_attn_combine",
           "flash_attn_func", "flash_attn_kvpacked_func", "flash_attn_qkvpacked_func", "flash_attn_varlen_func",
           "flash_attn_varlen_kvpacked_func", "flash_attn_varlen_qkvpacked_func", "flash_attn_with_kvcache",
           "get_scheduler_metadata", "install"]


def install():
    """From here on ``import flash_attn`` and ``import flash_attn_interface`` give heed's functions.

    Raises InvalidArgument where the real ones are imported already: half of a program would keep them.
    """
    modules = {"flash_attn": sys.modules[__name__], "flash_attn.flash_attn_interface": flash_attn_interface,
               "flash_attn.bert_padding": bert_padding, "flash_attn.layers": layers,
               "flash_attn.layers.rotary": layers.rotary, "flash_attn_interface": hopper}
    for name, module in modules.items():
        if sys.modules.get(name, module) is not module:
            raise InvalidArgument(f"{name} is imported already, from {getattr(sys.modules[name], '__file__', '?')}: "
                                  "install() must come before the first import of it")
    sys.modules.update(modules)
