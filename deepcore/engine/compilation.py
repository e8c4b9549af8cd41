"""Owns the compiling of models: ``engine.compile()``, by block, and what a user compiled before ``initialize``.

Knows nothing of compilers; a block at a time, because a model compiled whole emits all its gradients at the end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn

from deepcore.base.log import warn_once
from deepcore.comm.mesh import Mesh
from deepcore.errors import UsageError

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_NOTHING = (
    "engine.compile() found nothing to compile: blocks are cut into units of single layers. With "
    '"zero_optimization": {"reduce_bucket_size": N}, N the elements of a block at least, a block is a unit of its own.'
)


class CompiledBlocks(nn.Module):
    """The part of an engine that compiles its module."""

    module: nn.Module
    mesh: Mesh
    _compiled: list[nn.Module]  # blocks whose forward is compiled

    def compile(  # type: ignore[override]
        self,
        backend: Any = None,
        compile_kwargs: dict[str, Any] | None = None,
        schedule: Any = None,
        compiled_autograd_enabled: bool = False,
    ) -> None:
        """Compile the model a block at a time, until ``destroy``; a second call changes nothing.

        Args:
            backend: a name that torch has, or a callable; None: "inductor".
            compile_kwargs: keyword arguments of torch.compile.

        Raises:
            UsageError: an unknown backend; a model on cut sequences; ``schedule`` and ``compiled_autograd_enabled``,
                which are not there.
        """
        options = _options(backend, compile_kwargs, schedule, compiled_autograd_enabled)
        if self.mesh.sp.size > 1:
            raise UsageError(
                "engine.compile() does not have models on cut sequences yet",
                got=f"sequence_parallel_size={self.mesh.sp.size}; attention exchanges heads inside of each block",
                expected="sequence_parallel_size=1",
                do="leave compile() out, or compile the modules around attention with module.compile()",
            )
        self._compiled += compile_blocks(self.module, options)
        if not self._compiled:
            warn_once("compile", _NOTHING)


def compile_blocks(root: nn.Module, options: dict[str, Any]) -> list[nn.Module]:
    """Compile the forward of each block of ``root``; returns those blocks.

    Only ``forward`` is: hooks around it, which bring and free weights at stage 3, stay what they are.
    """
    done = []
    for block in blocks(root):
        if "forward" not in vars(block) and block._compiled_call_impl is None:  # else the user, or an earlier call, did
            # A method, so that a copy of the block gets one of its own.
            compiled = torch.compile(type(block).forward, **options)
            block.forward = MethodType(compiled, block)
            done.append(block)
    return done


def restore_blocks(done: list[nn.Module]) -> None:
    """Take back what ``compile_blocks`` did."""
    while done:
        vars(done.pop()).pop("forward", None)


def blocks(module: nn.Module, is_block: bool = False) -> Iterator[nn.Module]:
    """The largest modules that hold no list of blocks, or are in one, and have hooks nowhere inside.

    A layer of torch.nn alone is none: it is one kernel as it is.
    """
    if not any(True for _ in module.parameters()):
        return
    hooked = any(_has_hooks(child) for child in module.modules() if child is not module)
    if hooked or isinstance(module, _CONTAINERS) or (not is_block and any(map(_lists_blocks, module.modules()))):
        for child in module.children():
            yield from blocks(child, isinstance(module, nn.ModuleList | nn.Sequential))
    elif any(True for _ in module.children()) or not type(module).__module__.startswith("torch.nn."):
        yield module


def _lists_blocks(module: nn.Module) -> bool:
    """Whether ``module`` is a list of modules that are more than one layer."""
    is_list = isinstance(module, nn.ModuleList | nn.Sequential)
    return is_list and any(True for child in module.children() for _ in child.children())


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def compiled_in_place(model: nn.Module) -> nn.Module:
    """``model`` with every module that ``torch.compile(module)`` wrapped in its own place, compiled as it was.

    The wrapper would show in the names of parameters, in state dicts and checkpoints; ``module.compile()`` has none.
    """
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None:
        return model
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if name != "_orig_mod" and child is not None:
                module._modules[name] = _unwrapped(child, dynamo.OptimizedModule)
    return _unwrapped(model, dynamo.OptimizedModule)


def _unwrapped(module: nn.Module, wrapper: type[nn.Module]) -> nn.Module:
    if not isinstance(module, wrapper) or _has_hooks(module):  # hooks of its own would be lost
        return module
    inner = module.get_submodule("_orig_mod")
    if inner._compiled_call_impl is None:
        compiler: Any = module.dynamo_ctx
        inner._compiled_call_impl = compiler(inner._call_impl)
    return inner


def _options(backend: Any, kwargs: object, schedule: object, compiled_autograd: bool) -> dict[str, Any]:
    """What torch.compile gets; UsageError for what belongs to DeepCompile."""
    refused = {"schedule": schedule is not None, "compiled_autograd_enabled": compiled_autograd}
    for name, asked in refused.items():
        if asked:
            raise UsageError(
                f"engine.compile() does not have {name}",
                got=f"{name}={schedule if name == 'schedule' else compiled_autograd}",
                expected="backend and compile_kwargs",
                do=f"remove {name}",
            )
    if kwargs is not None and not isinstance(kwargs, dict):
        raise UsageError(
            "compile_kwargs are the keyword arguments of torch.compile",
            got=type(kwargs).__name__,
            expected="a dict",
            do='pass for example compile_kwargs={"dynamic": True}',
        )
    if kwargs and "backend" in kwargs:
        raise UsageError(
            "the backend is an argument of its own",
            got=f"compile_kwargs with backend={kwargs['backend']!r}",
            expected="engine.compile(backend=...)",
            do="move it out of compile_kwargs",
        )
    chosen = "inductor" if backend is None else backend
    if not callable(chosen) and chosen not in torch.compiler.list_backends(exclude_tags=()):
        raise UsageError(
            f"torch has no compiler backend {chosen!r}",
            got=f"backend={chosen!r}",
            expected=", ".join(torch.compiler.list_backends()),
            do='choose one of these, "inductor" as a rule',
        )
    return {"backend": chosen, **(kwargs or {})}
