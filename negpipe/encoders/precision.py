"""The precisions and kinds of attention that a device supports."""

from __future__ import annotations

from importlib.util import find_spec

from negpipe.config.encoder import Encoder
from negpipe.engine import processor
from negpipe.errors import ConfigError

UNITS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Processor flags for bfloat16: Intel's matrix units, Intel's and AMD's vector units, and ARM's."""
_EMULATED = "four to five times"
"""Measured with all-MiniLM-L6-v2 and batches of 8 texts of 90 tokens on one core with AVX2: 0.56 s in float32, 2.4 in
float16, 2.7 in bfloat16."""


def has_units(precision: str, device: str) -> bool:
    """Whether a device, with its name in torch, supports a precision of the encoder without emulation."""
    on_cpu = {"float32": True, "float16": False, "bfloat16": bool(processor.flags() & UNITS), "int8": True}
    return on_cpu[precision] or not device.startswith("cpu")


def check_precision(precision: str, device: str, key: str) -> None:
    """Reject a precision that the device does not support.

    Args:
        precision: that of the encoder.
        device: its name in torch.
        key: the setting, for the message.

    Raises:
        ConfigError: the precision would be emulated.
    """
    if has_units(precision, device):
        return
    if precision == "float16":
        raise ConfigError(
            f"{key}: 'float16' needs a GPU: on a CPU it takes {_EMULATED} the time of float32; set it to float32 on a"
            " CPU, or bfloat16 if supported"
        )
    raise ConfigError(
        f"{key}: 'bfloat16' needs a CPU that supports it (AMX-BF16, AVX512-BF16, ARM's BF16), and this one does not:"
        f" emulated, it takes {_EMULATED} the time of float32 and is less exact; set {key} to float32"
    )


def packs(attention: str) -> bool:
    """Whether a package for this kind of packed attention is installed."""
    own = {"flash_attention_2": "flash_attn", "flash_attention_3": "flash_attn_interface"}[attention]
    return any(find_spec(name) for name in (own, "kernels"))


def check_attention(encoder: Encoder, device: str) -> None:
    """Reject `encoder.attention` where the device does not support it, or its package is missing.

    Args:
        encoder: the settings.
        device: its name in torch; one that Ray decides later is checked there.

    Raises:
        ConfigError: it cannot run here.
    """
    if encoder.attention and device.startswith("cpu"):
        raise ConfigError(
            f"encoder.attention: '{encoder.attention}' needs a GPU: remove it on a CPU, where encoder.batch_tokens"
            " saves most of the padding"
        )
    if encoder.attention and device.startswith("cuda") and not packs(encoder.attention):
        raise ConfigError(
            f"encoder.attention: '{encoder.attention}' needs a package that is missing: run `pip install flash-attn`"
            " (or kernels), or remove it"
        )
