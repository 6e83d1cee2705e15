"""The one door to private interfaces of torch.

No other file of fxtrain uses a name of torch or NumPy that begins with an underscore, or ``torch.fx.experimental``. A
private interface may change with any release of torch. tests/test_torch_internals.py has a test of each, and
``supports`` says which parts of the compiler work with the installed version.
"""

# All modules are imported, so that INTERFACES is complete.
from fxtrain._torch_internals import collectives, dispatch, dynamo, inductor, loaders, memory, modules, pytree, tracing
