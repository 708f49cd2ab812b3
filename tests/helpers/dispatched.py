"""The operations that torch runs, by name: those that would wait for a GPU are seen on the CPU too."""

from torch.utils._python_dispatch import TorchDispatchMode


class Dispatched(TorchDispatchMode):
    """Notes every operation in it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})

    @property
    def waits(self):
        return [name for name in self.names if name in ("nonzero", "_local_scalar_dense", "equal", "masked_select")]
