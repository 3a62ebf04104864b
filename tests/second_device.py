"""A second device, played on the CPU: what mixes devices raises here, as it would on a GPU.

A tensor "on the device" is a `Remote`, which says device="gpu:0" and hides a CPU tensor that does
the work. Every operation passes through `Device`: where a `Remote` meets a CPU tensor that is no
mere number, it raises `Mixed`; what an operation makes on the device is a `Remote` again.

    with Device():
        sft.main(["--device", "gpu", ...])

It finds tensors that were left on the wrong device. It is no GPU: nothing about its kernels, its
speed or its memory shows here.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend(rename="gpu")
torch.gpu.get_amp_supported_dtype = lambda: [torch.bfloat16]  # asked for by autocast
torch.gpu.is_available = lambda: False  # or checkpoints of CPU tensors would be sent through it
aten = torch.ops.aten
GPU = torch.device("gpu", 0)
COPIES = {aten._to_copy.default, aten.copy_.default}  # the only ones that may go across
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}


class Mixed(RuntimeError):
    """Tensors of two devices met in one operation."""


class Remote(torch.Tensor):
    """A tensor on the played device; `here` is the CPU tensor that it stands for."""

    @staticmethod
    def __new__(cls, here):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=GPU,
        )

    def __init__(self, here):
        self.here = here

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return perform(operation, args, kwargs or {})

    def __deepcopy__(self, memo):
        if id(self) not in memo:
            copy = Remote(self.here.clone())
            if isinstance(self, torch.nn.Parameter):
                copy = torch.nn.Parameter(copy, self.requires_grad)
            memo[id(self)] = copy
        return memo[id(self)]

    def tolist(self):
        return self.here.detach().tolist()


class Device(TorchDispatchMode):
    """Within it, device="gpu" works; it also sees operations that make tensors from nothing."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return perform(operation, args, kwargs or {})

    def __enter__(self):
        self.tensor = torch.tensor  # makes its tensor before it looks at the device
        torch.tensor = self.move_new
        return super().__enter__()

    def __exit__(self, *error):
        torch.tensor = self.tensor
        return super().__exit__(*error)

    def move_new(self, data, *args, device=None, **options):
        made = self.tensor(data, *args, **options)
        return made if device is None else made.to(device)


def perform(operation, args, kwargs):
    """One operation: refuse a mixture, compute on the CPU, put the result where it belongs."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    remote = [x for x in tensors if isinstance(x, Remote)]
    local = [x for x in tensors if not isinstance(x, Remote)]
    if remote and operation not in COPIES | INDEXING and any(x.dim() for x in local):
        shapes = [tuple(x.shape) for x in local]
        raise Mixed(f"{operation}: {shapes} are on the CPU, the others on the device")
    target = kwargs.get("device")
    here_args, here_kwargs = tree_map_only(Remote, lambda x: x.here, (args, kwargs))
    if target is not None:
        here_kwargs["device"] = torch.device("cpu")
    made = operation(*here_args, **here_kwargs)
    stays = remote if target is None else torch.device(target).type == "gpu"
    if operation is aten.copy_.default:
        stays = isinstance(args[0], Remote)
    if not stays or operation is aten._local_scalar_dense.default:
        return made
    return same_objects(operation, args, kwargs, tree_map_only(torch.Tensor, to_device, made))


def to_device(x):
    return x if isinstance(x, Remote) else Remote(x)


def same_objects(operation, args, kwargs, made):
    """What an operation has changed in place it must return itself, not a new tensor."""
    written = []
    for place, argument in enumerate(operation._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written.append(args[place] if place < len(args) else kwargs[argument.name])
    returned = operation._schema.returns
    if written and returned and returned[0].alias_info is not None:
        return written[0] if len(returned) == 1 else tuple(written)
    return made
