"""Owns ``mesh_param``, the argument of ``initialize`` that names two sizes which a config names too.

Knows nothing of meshes; whether the sizes fit the number of ranks is ``resolve.py``'s arithmetic.
"""

from __future__ import annotations

from typing import Any

from deepcore.config.paths import is_unset
from deepcore.errors import ConfigError

KEYS = ("data_parallel_size", "sequence_parallel_size")


def with_mesh(raw: dict[str, Any], mesh_param: Any) -> dict[str, Any]:
    """``raw`` with the sizes of ``mesh_param``, (data, sequence), written in; ``raw`` itself stays as it is.

    Raises:
        ConfigError: not two positive integers, or the config says something else.
    """
    if mesh_param is None:
        return raw
    pair = isinstance(mesh_param, tuple | list) and len(mesh_param) == len(KEYS)
    if not pair or any(type(size) is not int or size < 1 for size in mesh_param):
        raise ConfigError(
            "mesh_param is not a mesh",
            got=repr(mesh_param),
            expected="(data, sequence): two positive integers whose product is the number of ranks",
            do='pass for example mesh_param=(2, 4), or set "sequence_parallel_size": 4 in the config',
        )
    for key, size in zip(KEYS, mesh_param, strict=True):
        if key in raw and not is_unset(raw[key]) and raw[key] != size:
            raise ConfigError(
                f"mesh_param contradicts {key} of the config",
                got=f"mesh_param={tuple(mesh_param)} and {key} = {raw[key]!r}",
                expected="one of the two, or equal sizes",
                do=f"remove {key} from the config",
            )
    return {**raw, **dict(zip(KEYS, mesh_param, strict=True))}
