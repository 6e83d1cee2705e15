"""The one door to private interfaces of torch.

No other file of fxtrain uses a name of torch or NumPy that begins with an underscore, or ``torch.fx.experimental``. A
private interface may change with any release of torch. tests/test_torch_internals.py has a test of each, and
``supports`` says which parts of the compiler work with the installed version.
"""

from typing import TYPE_CHECKING

from fxtrain._torch_internals._dispatch import Operator as Operator
from fxtrain._torch_internals._dispatch import OperatorPacket as OperatorPacket
from fxtrain._torch_internals._dispatch import TorchDispatchMode as TorchDispatchMode
from fxtrain._torch_internals._dispatch import dispatch_keys_kept as dispatch_keys_kept
from fxtrain._torch_internals._dispatch import fake_mode as fake_mode
from fxtrain._torch_internals._dispatch import grad_mode_setter as grad_mode_setter
from fxtrain._torch_internals._dispatch import is_in_place as is_in_place
from fxtrain._torch_internals._dispatch import is_recorded as is_recorded
from fxtrain._torch_internals._dispatch import is_view as is_view
from fxtrain._torch_internals._dispatch import operator_name as operator_name
from fxtrain._torch_internals._dispatch import without_dispatch_modes as without_dispatch_modes
from fxtrain._torch_internals._dynamo import COMPILING_MODULE as COMPILING_MODULE
from fxtrain._torch_internals._dynamo import LOGGER as LOGGER
from fxtrain._torch_internals._dynamo import backend_named as backend_named
from fxtrain._torch_internals._dynamo import can_show_to_modes as can_show_to_modes
from fxtrain._torch_internals._dynamo import compile_lock as compile_lock
from fxtrain._torch_internals._dynamo import constant_in_dynamo as constant_in_dynamo
from fxtrain._torch_internals._dynamo import explaining_backend as explaining_backend
from fxtrain._torch_internals._dynamo import inlined_only as inlined_only
from fxtrain._torch_internals._dynamo import is_dynamo_loaded as is_dynamo_loaded
from fxtrain._torch_internals._dynamo import modes_work_below_compile as modes_work_below_compile
from fxtrain._torch_internals._dynamo import nested_calls_inlined as nested_calls_inlined
from fxtrain._torch_internals._dynamo import recompile_limit_error as recompile_limit_error
from fxtrain._torch_internals._dynamo import restoring_saved_tensor_hooks as restoring_saved_tensor_hooks
from fxtrain._torch_internals._dynamo import show_to_modes as show_to_modes
from fxtrain._torch_internals._inductor import cache_folder as cache_folder
from fxtrain._torch_internals._inductor import compile_graph as compile_graph
from fxtrain._torch_internals._inductor import compile_package as compile_package
from fxtrain._torch_internals._inductor import compiled_graph_class as compiled_graph_class
from fxtrain._torch_internals._inductor import has_option as has_option
from fxtrain._torch_internals._inductor import kernel_count as kernel_count
from fxtrain._torch_internals._inductor import load_package as load_package
from fxtrain._torch_internals._inductor import loop_operators as loop_operators
from fxtrain._torch_internals._inductor import mode_options as mode_options
from fxtrain._torch_internals._inductor import pointwise as pointwise
from fxtrain._torch_internals._inductor import register_lowering as register_lowering
from fxtrain._torch_internals._interface import Feature as Feature
from fxtrain._torch_internals._interface import Interface as Interface
from fxtrain._torch_internals._interface import MissingInterfaceError as MissingInterfaceError
from fxtrain._torch_internals._loaders import forget_iterator as forget_iterator
from fxtrain._torch_internals._loaders import is_by_index as is_by_index
from fxtrain._torch_internals._loaders import iterator_of as iterator_of
from fxtrain._torch_internals._loaders import set_fetcher as set_fetcher
from fxtrain._torch_internals._loaders import shut_down_workers as shut_down_workers
from fxtrain._torch_internals._loaders import unregister_workers as unregister_workers
from fxtrain._torch_internals._loaders import workers_of as workers_of
from fxtrain._torch_internals._memory import start_memory_history as start_memory_history
from fxtrain._torch_internals._memory import stop_memory_history as stop_memory_history
from fxtrain._torch_internals._memory import write_memory_snapshot as write_memory_snapshot
from fxtrain._torch_internals._modules import CALLS as CALLS
from fxtrain._torch_internals._modules import batch_norms as batch_norms
from fxtrain._torch_internals._modules import has_accumulation_hooks as has_accumulation_hooks
from fxtrain._torch_internals._modules import has_gradient_hooks as has_gradient_hooks
from fxtrain._torch_internals._modules import own_buffers as own_buffers
from fxtrain._torch_internals._modules import own_modules as own_modules
from fxtrain._torch_internals._modules import own_parameters as own_parameters
from fxtrain._torch_internals._operators import attention_on_cpu as attention_on_cpu
from fxtrain._torch_internals._operators import ctc_loss as ctc_loss
from fxtrain._torch_internals._operators import item_operator as item_operator
from fxtrain._torch_internals._operators import linear_by_onednn as linear_by_onednn
from fxtrain._torch_internals._pytree import is_leaf as is_leaf
from fxtrain._torch_internals._pytree import node_of_parts as node_of_parts
from fxtrain._torch_internals._pytree import parts_of as parts_of
from fxtrain._torch_internals._pytree import register_pytree_node as register_pytree_node
from fxtrain._torch_internals._storages import copy_all as copy_all
from fxtrain._torch_internals._storages import storage_id as storage_id
from fxtrain._torch_internals._storages import storage_use_counter as storage_use_counter
from fxtrain._torch_internals._storages import write_count as write_count
from fxtrain._torch_internals._support import INTERFACES as INTERFACES
from fxtrain._torch_internals._support import NEWEST_TESTED as NEWEST_TESTED
from fxtrain._torch_internals._support import is_tested as is_tested
from fxtrain._torch_internals._support import missing_interfaces as missing_interfaces
from fxtrain._torch_internals._support import supports as supports
from fxtrain._torch_internals._tracing import TRACER_MODULES as TRACER_MODULES
from fxtrain._torch_internals._tracing import compiling_flag as compiling_flag
from fxtrain._torch_internals._tracing import decompositions as decompositions
from fxtrain._torch_internals._tracing import has_symbolic_sizes as has_symbolic_sizes
from fxtrain._torch_internals._tracing import is_known_true as is_known_true
from fxtrain._torch_internals._tracing import is_traced as is_traced
from fxtrain._torch_internals._tracing import make_fx as make_fx
from fxtrain._torch_internals._tracing import new_fake_mode as new_fake_mode
from fxtrain._torch_internals._tracing import new_shape_env as new_shape_env
from fxtrain._torch_internals._tracing import node_of as node_of
from fxtrain._torch_internals._tracing import set_compiling_flag as set_compiling_flag
from fxtrain._torch_internals._tracing import size_functions as size_functions
from fxtrain._torch_internals._tracing import tracer as tracer
from fxtrain._torch_internals._tracing import unrecorded as unrecorded
from fxtrain._torch_internals._tracing import with_symbolic_sizes as with_symbolic_sizes
from fxtrain._torch_internals._transforms import is_transformed as is_transformed
from fxtrain._torch_internals._transforms import outside_of_traces as outside_of_traces
from fxtrain._torch_internals._transforms import unwrapped as unwrapped

if TYPE_CHECKING:
    # Only for annotations, because the import is slow.
    from torch._subclasses import FakeTensor as FakeTensor
    from torch._subclasses import FakeTensorMode as FakeTensorMode
