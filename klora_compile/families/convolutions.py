"""Detection of convolutions whose tensors and names in a file do not show it."""

from __future__ import annotations

from klora_runtime.families.catalogue import FAMILIES


def folded_kernel(component: str, module: str) -> tuple[int, ...]:
    """Return the kernel of a layer whose tensors may be folded to matrices; () if it has none.

    Args:
        module: module path in diffusers' names.
    """
    name = module.rpartition(".")[2]
    kernels = (family.kernels for family in FAMILIES.values() if component in family.denoisers)
    return next((own[name] for own in kernels if name in own), ())


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
