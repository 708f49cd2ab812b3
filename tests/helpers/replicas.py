"""A replica as `torch.nn.DataParallel` makes one for each GPU (torch.nn.parallel.replicate), on the CPU."""


def replica_of(network):
    """A copy whose parameters are plain attributes, as torch's are: tensors on the graph of the originals."""
    modules = list(network.modules())
    place = {module: at for at, module in enumerate(modules)}
    copies = [module._replicate_for_data_parallel() for module in modules]
    for module, copy in zip(modules, copies, strict=True):
        for name, child in module._modules.items():
            if child is None:
                copy._modules[name] = None
            else:
                setattr(copy, name, copies[place[child]])
        copy._former_parameters = {}
        for name, value in module._parameters.items():
            if value is None:
                copy._parameters[name] = None
            else:
                setattr(copy, name, value * 1)
                copy._former_parameters[name] = value
    return copies[0]
