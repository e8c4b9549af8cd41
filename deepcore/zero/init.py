"""Owns ``Init``: the context in which a model is built that no rank ever holds whole.

Knows nothing of how parameters are scattered meanwhile (``construction``) or how an engine takes them over.
"""

from __future__ import annotations

from contextlib import ExitStack
from types import TracebackType
from typing import Any

import torch

from deepcore.base.log import warn_once
from deepcore.comm.mesh import Axis, Mesh
from deepcore.comm.setup import World, init_distributed
from deepcore.config import load
from deepcore.errors import ConfigError
from deepcore.zero.construction import Construction
from deepcore.zero.hooks import watch_construction

_running: list[Construction] = []  # the construction of the outermost open Init


class Init:
    """``with deepcore.zero.Init(): model = Model()`` builds a model whose parameters are scattered as they come.

    Every rank runs the same code with the same seed, and gets the parts of the weights that ordinary construction
    would have given it: random streams are consumed in full on every rank. At most the parameters of one module are
    whole at a time; re-initialisation in a parent's ``__init__`` (``self.apply(...)``), weights tied by assignment,
    ``model.to(dtype)`` and reading of values work inside, each at the price of a gather. Nothing of torch is patched:
    a function mode and two registration hooks are there until the block ends, also by an exception.

    Afterwards parameters are empty tensors. ``deepcore.initialize`` at stage 3 takes them over, unit by unit, and
    ``GatheredParameters`` makes them whole. Buffers, lazy and meta parameters are left as they are. Parameters of a
    module that is copied (``copy.deepcopy``) are scattered when a parent takes the copy in.

    Values stay in the dtype in which they were built, so that an engine in bf16 or fp16 has fp32 masters of every bit;
    ``dtype`` casts at once instead, for half the memory and without those bits.

    Args:
        module: an existing module to scatter; then no block is needed.
        data_parallel_group: None; subgroups of the ranks are not supported.
        mem_efficient_linear: accepted for compatibility; linear layers need nothing special here.
        remote_device: "cpu" keeps the parts in host memory until the engine takes them; None: this rank's device.
        pin_memory: have those parts page-locked.
        config_dict_or_path: the config of the engine to be. With another stage than 3 the block does nothing.
        config: the older name of ``config_dict_or_path``.
        enabled: False makes the block do nothing.
        dtype: cast floating-point parameters.
        mpu, zero_param_parallel_group, zero_quantized_weights, zero_quantized_nontrainable_weights,
            zero_quantized_gradients, sequence_data_parallel_group, param_swapper, tensor_overrides: not supported;
            None or False.

    Raises:
        ConfigError: an argument that cannot be honoured.
    """

    def __init__(
        self,
        module: torch.nn.Module | None = None,
        data_parallel_group: Any = None,
        mem_efficient_linear: bool = True,
        remote_device: str | None = None,
        pin_memory: bool = False,
        config_dict_or_path: Any = None,
        config: Any = None,
        enabled: bool = True,
        dtype: torch.dtype | None = None,
        mpu: Any = None,
        zero_param_parallel_group: Any = None,
        zero_quantized_weights: bool = False,
        zero_quantized_nontrainable_weights: bool = False,
        zero_quantized_gradients: bool = False,
        sequence_data_parallel_group: Any = None,
        param_swapper: Any = None,
        tensor_overrides: Any = None,
    ) -> None:
        _refuse(
            data_parallel_group=data_parallel_group,
            mpu=mpu,
            zero_param_parallel_group=zero_param_parallel_group,
            zero_quantized_weights=zero_quantized_weights,
            zero_quantized_nontrainable_weights=zero_quantized_nontrainable_weights,
            zero_quantized_gradients=zero_quantized_gradients,
            sequence_data_parallel_group=sequence_data_parallel_group,
            param_swapper=param_swapper,
            tensor_overrides=tensor_overrides,
        )
        given = config if config_dict_or_path is None else config_dict_or_path
        self._enabled = enabled and _wants_stage_3(given)
        self._remote, self._pin, self._dtype = _require_device(remote_device), pin_memory, _require_float(dtype)
        self._stack = ExitStack()
        self._construction: Construction | None = None
        if module is not None:
            with self:
                if _running:
                    _running[0].take_module(module)

    def __enter__(self) -> Init:
        if not self._enabled or _running:
            return self  # inside another one that one does the work
        world = init_distributed()
        construction = Construction(_axis(world), self._home(world), self._dtype, pin=self._pin)
        with ExitStack() as stack:
            for handle in watch_construction(construction.take_param, construction.take_module):
                stack.callback(handle.remove)
            stack.callback(_running.clear)
            _running.append(construction)
            stack.enter_context(construction)
            self._stack, self._construction = stack.pop_all(), construction
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        construction, self._construction = self._construction, None
        self._stack.close()
        if construction is not None and kind is None:  # after an error other ranks may not come to scatter
            construction.finish()

    def _home(self, world: World) -> torch.device:
        return world.device if self._remote is None else torch.device(self._remote)


def _axis(world: World) -> Axis:
    return Mesh.build(world).zero_axis  # all ranks: nothing is made that would have to be destroyed


def _wants_stage_3(given: Any) -> bool:
    if given is None:
        return True
    section = load(given).get("zero_optimization")
    stage = section.get("stage", 0) if isinstance(section, dict) else 0
    if stage == 3:
        return True
    warn_once("init without stage 3", f"zero.Init does nothing: its config has ZeRO stage {stage}, and needs stage 3.")
    return False


def _require_device(name: str | None) -> str | None:
    if name in (None, "none"):
        return None
    if name != "cpu":
        raise ConfigError(
            "zero.Init cannot keep parameters there",
            got=f"remote_device={name!r}",
            expected="None (this rank's device) or 'cpu'",
            do="leave remote_device out",
        )
    return name


def _require_float(dtype: torch.dtype | None) -> torch.dtype | None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ConfigError(
            "zero.Init cannot cast parameters to this",
            got=f"dtype={dtype!r}",
            expected="a floating-point torch.dtype, or None to keep theirs",
            do="leave dtype out: the engine's config says in which dtype the model trains",
        )
    return dtype


def _refuse(**arguments: Any) -> None:
    for name, value in arguments.items():
        if value not in (None, False):
            raise ConfigError(
                f"zero.Init does not support '{name}'",
                got=f"{name}={value!r}",
                expected="None: parameters are cut over all ranks",
                do="leave it out",
            )
