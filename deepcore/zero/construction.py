"""Owns the scattering of parameters while their model is being built, so that few are whole at a time.

Knows nothing of configs or engines.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary

from deepcore.comm.mesh import Axis
from deepcore.sharding import scattered
from deepcore.sharding.scattered import Scattered

_BARE = (  # of a scattered parameter, what its empty stand-in answers rightly or takes as well
    "_backward_hooks _base _grad _grad_fn _version data_ptr device dtype element_size grad grad_dtype grad_fn "
    "has_names is_complex is_cpu is_cuda is_floating_point is_inference is_leaf is_meta is_mps is_quantized is_sparse "
    "is_xpu itemsize layout name output_nr register_hook register_post_accumulate_grad_hook requires_grad "
    "requires_grad_ retain_grad retains_grad __hash__"
)
_FORM = "dim is_contiguous nbytes ndim ndimension nelement numel shape size storage_offset stride __len__"


def _functions(names: str) -> frozenset[Callable[..., Any]]:
    """The methods, and the getters and setters of properties, of these names, as a mode is told of them."""
    found: list[Any] = []
    for name in names.split():
        member = inspect.getattr_static(torch.Tensor, name, None)
        if inspect.isgetsetdescriptor(member) or isinstance(member, property):
            found += [getattr(torch.Tensor, name).__get__, getattr(torch.Tensor, name).__set__]
        elif member is not None:
            found.append(getattr(torch.Tensor, name))
    return frozenset(found)


BARE, FORM = _functions(_BARE), _functions(_FORM)


class Construction(TorchFunctionMode):
    """While it is entered, parameters that modules take in are whole only as long as somebody works on them.

    Whole are, at any point, those of the innermost module whose ``__init__`` is running, those that the torch function
    of the moment is given, and those of which somebody keeps a view. All others are scattered, and gathered again when
    a torch function is given one: an initialisation like ``self.apply(self._init_weights)`` works, at the price of a
    gather per parameter that it touches. Shapes, dtypes and flags are answered without.

    Ranks run the same program: what is gathered when follows from its order alone, so that they do it together. The
    first rank's values are everybody's.
    """

    def __init__(self, axis: Axis, home: torch.device, dtype: torch.dtype | None, *, pin: bool) -> None:
        super().__init__()
        self._axis, self._home, self._dtype = axis, home, dtype
        self._pin = pin and home.type == "cpu" and axis.device.type == "cuda"
        self._whole: dict[torch.nn.Parameter, Scattered] = {}  # by identity, in the order in which they became so
        self._owners = WeakTensorKeyDictionary()  # of every parameter taken in here: a weak reference to its module
        self._lent: list[Scattered] = []  # scattered, but somebody still keeps a view

    # --- what is being built --------------------------------------------------------------------------------------

    def take_param(self, module: torch.nn.Module, param: torch.nn.Parameter) -> None:
        """``module`` takes in a parameter."""
        with torch._C.DisableTorchFunction():
            if scattered.find(param) is not None:
                return
            self._scatter_idle(())
            self._fill_twin(param)
            if _is_ordinary(param):
                entry = Scattered(param, self._axis, self._home, self._dtype, pin=self._pin)
                scattered.enter(param, entry)
                self._owners[param] = weakref.ref(module)
                self._whole[param] = entry

    def _fill_twin(self, param: torch.nn.Parameter) -> None:
        """Give ``nn.Parameter(other)`` its values, where ``other`` is scattered: torch does not tell a mode of it."""
        if is_lazy(param) or param.shape != (0,):
            return
        for other in self._owners:
            entry = scattered.find(other)
            if entry is not None and not entry.is_whole and param.is_set_to(other):
                param.data = entry.values().as_strided(entry.shape, entry.stride)
                return

    def take_module(self, child: torch.nn.Module) -> None:
        """A module takes in a child: a copy has parameters that no module was seen to take in."""
        for module in child.modules():
            for param in module.parameters(recurse=False):
                self.take_param(module, param)

    def finish(self) -> None:
        """Scatter everything."""
        for param in list(self._whole):
            self._scatter(param)
        self._lent.clear()
        for param in self._owners:
            entry = scattered.find(param)
            if entry is not None:
                entry.finish(param)

    # --- what is done with it -------------------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func in BARE:
            return func(*args, **kwargs)
        if func in FORM:
            return func(*tree_map_only(torch.nn.Parameter, _form, tuple(args)), **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        self._scatter_idle(given)
        for param in given:
            entry = scattered.find(param)
            if entry is not None and not entry.is_whole:
                assert isinstance(param, torch.nn.Parameter)
                entry.gather(param)
                self._whole[param] = entry
        result = func(*args, **kwargs)
        self._note_aliases(result)
        return result

    def _note_aliases(self, result: Any) -> None:
        memory = self._memory()
        for leaf in tree_leaves(result) if memory else ():
            if isinstance(leaf, torch.Tensor) and leaf not in self._whole:
                entry = memory.get(_address(leaf))
                if entry is not None:
                    entry.note_alias(leaf)

    def _memory(self) -> dict[int, Scattered]:
        """What is whole, by the address of its memory."""
        return {_address(param): entry for param, entry in self._whole.items()}

    def _scatter_idle(self, given: Iterable[torch.Tensor]) -> None:
        """Scatter what nobody works on: neither the module being built nor the coming call, which is given tensors."""
        self._lent = [entry for entry in self._lent if not entry.settle()]
        if not self._whole:
            return
        built = _module_being_built()
        used = {_address(tensor) for tensor in given}
        for param, entry in list(self._whole.items()):
            owner = self._owners.get(param, lambda: None)()
            if (owner is None or owner is not built) and _address(param) not in used and not entry.pins:
                self._scatter(param)

    def _scatter(self, param: torch.nn.Parameter) -> None:
        entry = self._whole.pop(param)
        entry.scatter(param)
        if not entry.settle():
            self._lent.append(entry)


def _is_ordinary(param: torch.nn.Parameter) -> bool:
    """Whether it has values, in memory of its own that can be cut."""
    if is_lazy(param) or type(param.data) is not torch.Tensor:
        return False
    return param.layout is torch.strided and param.device.type != "meta" and param.numel() > 0


def _form(param: torch.nn.Parameter) -> torch.Tensor:
    entry = scattered.find(param)
    return param if entry is None or entry.is_whole else entry.template


def _address(tensor: torch.Tensor) -> int:
    """Where its memory begins; 0 for none."""
    if not isinstance(tensor, torch.nn.Parameter) and type(tensor) is not torch.Tensor:
        return 0
    return tensor.untyped_storage().data_ptr() if tensor.layout is torch.strided else 0


def _module_being_built() -> torch.nn.Module | None:
    """The module whose ``__init__`` is running, the innermost one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__init__" and code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, torch.nn.Module):
                return first
        frame = frame.f_back
    return None
