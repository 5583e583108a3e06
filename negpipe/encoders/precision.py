"""Which numbers a device computes in."""

from __future__ import annotations

from negpipe.engine import processor
from negpipe.errors import ConfigError

UNITS = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""What processors call their units for bfloat16: Intel's for matrices, Intel's and AMD's for vectors, those of ARM."""


def has_units(precision: str, device: str) -> bool:
    """Whether a device, as torch calls it, computes in a precision of the encoder without emulating it."""
    on_cpu = {"float32": True, "float16": False, "bfloat16": bool(processor.flags() & UNITS), "int8": True}
    return on_cpu[precision] or not device.startswith("cpu")


def check_precision(precision: str, device: str, key: str) -> None:
    """Refuse what the device has no units for.

    Args:
        precision: as the encoder's.
        device: as torch calls it.
        key: the setting, for the message.

    Raises:
        ConfigError: it would be emulated.
    """
    if has_units(precision, device):
        return
    if precision == "float16":
        raise ConfigError(f"{key}: 'float16' needs a GPU: set it to float32 on a CPU, or bfloat16 on one that has it")
    raise ConfigError(
        f"{key}: 'bfloat16' needs a CPU with units for it (AMX-BF16, AVX512-BF16, ARM's BF16), and this one names none:"
        " it would be emulated, no faster than float32, many times slower without AVX-512, and less exact;"
        f" set {key} to float32"
    )
