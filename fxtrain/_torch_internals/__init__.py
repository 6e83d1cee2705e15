"""The one door to private interfaces of torch.

No other file of fxtrain uses a name of torch or NumPy that begins with an underscore, or ``torch.fx.experimental``. A
private interface may change with any release of torch. tests/test_torch_internals.py has a test of each, and
``supports`` says which parts of the compiler work with the installed version.
"""

# All modules are imported, so that INTERFACES is complete.
from fxtrain._torch_internals import dispatch as dispatch
from fxtrain._torch_internals import dynamo as dynamo
from fxtrain._torch_internals import inductor as inductor
from fxtrain._torch_internals import loaders as loaders
from fxtrain._torch_internals import memory as memory
from fxtrain._torch_internals import modules as modules
from fxtrain._torch_internals import operators as operators
from fxtrain._torch_internals import pytree as pytree
from fxtrain._torch_internals import storages as storages
from fxtrain._torch_internals import tracing as tracing
from fxtrain._torch_internals import transforms as transforms
