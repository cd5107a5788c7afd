"""Detection of convolutions whose tensors and names in a file do not show it."""

from __future__ import annotations

from klora_runtime.families.catalogue import FAMILIES

#: (component, last name of a module) -> kernel; the first family that has one decides.
_KERNELS: dict[tuple[str, str], tuple[int, ...]] = {}
for _family in FAMILIES.values():
    for _component in _family.denoisers:
        for _name, _kernel in _family.kernels.items():
            _KERNELS.setdefault((_component, _name), _kernel)


def folded_kernel(component: str, module: str) -> tuple[int, ...]:
    """Return the kernel of a layer whose tensors may be folded to matrices; () if it has none.

    Args:
        module: module path in diffusers' names.
    """
    return _KERNELS.get((component, module.rpartition(".")[2]), ())


def is_pointwise(family: str | None, component: str, module: str) -> bool:
    """Return whether a layer of two dimensions is a 1x1 convolution.

    Args:
        family: key of the family; if None, all families with this component must agree.
        module: module path in diffusers' names.
    """
    fitting = [
        record
        for key, record in FAMILIES.items()
        if component in record.denoisers and (family not in FAMILIES or key == family)
    ]
    name = module.rpartition(".")[2]
    return bool(fitting) and all(name in record.pointwise for record in fitting)
