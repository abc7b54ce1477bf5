"""flash_attn.layers: of it, rotary embedding."""

from . import rotary

__all__ = ["rotary"]
