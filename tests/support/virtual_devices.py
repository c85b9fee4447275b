"""Eight virtual devices for JAX. A file of tests asks for them where it is imported."""

from __future__ import annotations

import jax


def use_eight_devices() -> None:
    """Before JAX has computed anything in this process; several files may ask."""
    jax.config.update("jax_num_cpu_devices", 8)  # type: ignore[no-untyped-call]
