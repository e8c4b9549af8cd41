"""Floor 3: the ZeRO stages (Rajbhandari et al. 2020), one small file each, the hooks that drive them, and access.

The public names load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepcore.zero.access import safe_get_full_fp32_param as safe_get_full_fp32_param
    from deepcore.zero.access import safe_get_full_grad as safe_get_full_grad
    from deepcore.zero.access import safe_get_local_fp32_param as safe_get_local_fp32_param
    from deepcore.zero.access import safe_get_local_grad as safe_get_local_grad
    from deepcore.zero.access import safe_set_full_fp32_param as safe_set_full_fp32_param
    from deepcore.zero.access import safe_set_full_grad as safe_set_full_grad
    from deepcore.zero.access import safe_set_local_fp32_param as safe_set_local_fp32_param
    from deepcore.zero.access import safe_set_local_grad as safe_set_local_grad
    from deepcore.zero.access import safe_update_full_grad_vectorized as safe_update_full_grad_vectorized
    from deepcore.zero.gather import GatheredParameters as GatheredParameters
    from deepcore.zero.gather import register_external_parameter as register_external_parameter
    from deepcore.zero.gather import unregister_external_parameter as unregister_external_parameter
    from deepcore.zero.init import Init as Init
    from deepcore.zero.state_access import safe_get_full_optimizer_state as safe_get_full_optimizer_state
    from deepcore.zero.state_access import safe_get_local_optimizer_state as safe_get_local_optimizer_state
    from deepcore.zero.state_access import safe_set_full_optimizer_state as safe_set_full_optimizer_state
    from deepcore.zero.state_access import safe_set_local_optimizer_state as safe_set_local_optimizer_state

_HOMES = {
    "GatheredParameters": "gather",
    "Init": "init",
    "register_external_parameter": "gather",
    "unregister_external_parameter": "gather",
    "safe_update_full_grad_vectorized": "access",
    **{
        f"safe_{verb}_{extent}_{what}": home
        for verb in ("get", "set")
        for extent in ("full", "local")
        for what, home in (("fp32_param", "access"), ("grad", "access"), ("optimizer_state", "state_access"))
    },
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
