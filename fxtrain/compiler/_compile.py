"""The function ``compile``, which makes compiled steps."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fxtrain.compiler._compiled import Compiled
from fxtrain.compiler._recompiles import OnRecompile
from fxtrain.compiler.lowering._executable import Backend
from fxtrain.compiler.lowering._modes import AHEAD, MODES
from fxtrain.compiler.lowering._routes import Routes
from fxtrain.core import check_choice, check_positive_int, describe, did_you_mean
from fxtrain.core._short_tracebacks import with_short_traceback
from fxtrain.step import EvalFunction, Step

if TYPE_CHECKING:
    # Only for annotations, because the import is slow.
    from fxtrain.compiler.passes._memory_policy import Memory
    from fxtrain.compiler.passes._transfer_buckets import Reshard


@with_short_traceback
def compile(  # noqa: A001
    step: Callable[..., Any],
    *,
    donate: bool = False,
    backend: Backend | None = None,
    mode: str | None = None,
    dynamic: bool = False,
    fullgraph: bool = False,
    steps_per_call: int = 1,
    on_recompile: OnRecompile = "warn",
    background: bool = False,
    memory: Memory = "save",
    reshard: Reshard = "after_forward",
    check: bool = True,
    artefacts: str | os.PathLike[str] | None = None,
) -> Compiled:
    """Compiles a step into one graph: forward, backward, optimizer and traced callbacks.

    The first call traces and compiles the step. Changed values never recompile it, because counters and learning rates
    are tensors. Slots that only the loop uses stay outside the graph, so callbacks of the loop can be added or removed
    without recompiling. Everything else that the step reads besides its arguments (modules, closures, globals,
    environment variables, autocast, the default dtype) is a constant of the graph and keeps its value from the time of
    the trace. Random samples from Python and numpy, clocks and files are either read at each call or refused.

    A step whose Python code needs the value of a tensor, as in ``if loss > 1``, ``.item()`` or a mask as an index, has
    no such graph. The first of these routes that works is taken instead, with one warning that names the line:

    1. One graph for the values that were read. Each call checks that they are the same, and a few other values get
       graphs of their own.
    2. One graph by Dynamo.
    3. The loss function in several graphs, differentiated by ``torch.autograd``, and the optimizer and the traced
       callbacks as one graph.
    4. The forward and backward passes uncompiled, and the rest as one graph.

    All routes compute the same result.

    The first call takes from ten seconds to minutes. Compiled code is cached on disk (``TORCHINDUCTOR_CACHE_DIR``). A
    later process runs the uncompiled step once, on copies, and loads the graph that was compiled for the same
    operators, in a fraction of a second. It traces the step, in seconds, if the operators do not identify its graph: on
    GPUs, with a mesh, ``memory``, ``dynamic``, ``check=False`` or regions to recompute, or if it was compiled in the
    background. Of the processes on a machine that need a graph at the same time, as ranks do, one compiles it and the
    others wait. ``artefacts`` takes it to other machines. The logger ``fxtrain.compiler`` reports at level INFO what is
    compiled or loaded and how long it took.

    The first two calls of each graph are checked against the uncompiled step, which runs once more on the same state
    and batch. All leaves of the new state and of the output are compared. Where a tolerance is not enough, the
    uncompiled step is repeated with noise in the last bits of each operation, and differences of that size pass. The
    second call shows values that were frozen by the trace, such as a global that has changed. The check never changes
    results or random generators, but the step's own Python code, such as ``print``, runs again. Steps that open files
    and states that do not fit into memory several times are not checked, which the logger reports. A check takes one
    uncompiled step. If differences need an explanation, as those of transformers do, the first check takes two to eight
    more steps, each about five times as slow because of the noise. A graph that has passed is marked in the folder of
    torch's compiled code, and is not checked again by later processes on this machine. Of a step with a mesh, the first
    call is checked, on all ranks together. Other steps in several processes are not. ``check=False`` leaves all this
    out.

    On the CPU, glibc is set to keep up to 2 GiB of freed memory for the next step instead of returning it to the
    system. Settings such as ``MALLOC_TRIM_THRESHOLD_`` and other allocators are left alone.

    Args:
        step: From ``train_step`` or ``eval_step``, or any pure function ``(state, batch) -> (state, output)``.
        donate: Whether the new state reuses the buffers of the old one in place, which saves the memory and the time of
            a second state. Any later access to the old state raises ``DonatedError``. Leaves that are referenced
            elsewhere (a parameter, a view, a dict of them) are copied first and stay valid.
        backend: A backend of ``torch.compile``, by name or as a function. It is called through Dynamo, which checks its
            assumptions about Python at each call, so dispatch overhead is higher. By default, the step is traced and
            compiled by Inductor.
        mode: As in ``torch.compile``. ``"reduce-overhead"`` and ``"max-autotune"`` replay CUDA graphs of steps that are
            one traced graph of fixed sizes, with the state donated and the batch on the same GPU. They share one memory
            pool. Other steps run without CUDA graphs. ``"ahead-of-time"`` builds a shared library that runs without
            Python between its kernels. It takes about twice as long to build, makes small steps faster, and is cached
            with torch's other compiled code.
        dynamic: Whether batch sizes are symbolic: one graph for all sizes, slower than a graph for each. Dropout masks
            and other random samples are those of the uncompiled step at every size. Sizes 0 and 1 are never symbolic,
            so a batch of one example compiles another graph. Code that reads a size as a number, such as ``len(x)`` or
            torch's recurrent layers, compiles a graph for each size, and the warning names the sizes. Use
            ``x.shape[0]``, or pad to few sizes.
        fullgraph: Whether a step that cannot be one graph is an error.
        steps_per_call: How many steps ``fit`` takes per dispatch, in one graph. Useful if calling a graph takes longer
            than computing it. Traced callbacks are folded at each step. Callbacks of the loop are folded after all of
            them, so their requests take effect up to this many steps later. Compile time grows in proportion. Steps
            left over at the end of an epoch are taken one by one.
        on_recompile: What to do if the structure, a shape or a dtype of state or batch changes: ``"warn"`` compiles
            another graph and says what changed, ``"error"`` raises ``RecompileError``, and ``"allow"`` compiles
            silently. Batches that vary in size cause one warning. Sizes declared by a data source, such as
            ``fxtrain.data.bucketed``, compile a graph each without a warning or an error.
        background: Whether to compile in a worker thread while steps run uncompiled. The second call traces the step,
            which takes seconds, and hands the graph to the worker. Calls switch to the graph as soon as it is ready.
            The worker compiles one graph at a time, in the order in which sizes first appeared. Uncompiled steps are
            slower while it works. Results agree within the tolerance of compiled steps, but are not bitwise
            reproducible, because timing decides at which step the switch happens. A resume warns about this. A step
            that cannot be traced, or that Inductor refuses, is compiled in the foreground by the routes above.
            ``pending`` and ``uncompiled_steps`` of the compiled step count graphs and steps. Pending graphs are
            discarded when the process ends. Requires a single process, and excludes ``backend``, ``mode`` and
            ``dynamic``.
        memory: What the backward pass finds in memory. ``"save"`` keeps what autograd keeps. ``"recompute"`` keeps only
            the values at cuts of the forward pass, at the places where the fewest bytes are live, such as between the
            blocks of a transformer. All others are recomputed, at the cost of at most one more forward pass. The number
            of cuts is the one with the lowest estimated peak. A fraction in (0, 1] limits the activations, which are
            values of the forward pass and their gradients that are in memory at one time, to this part of what they
            take with ``"save"``, and recomputes as little as possible, by estimated time. Estimates come from the graph
            before fusion. A limit below what recomputation can reach causes a warning and takes the lowest peak.
            ``"offload"`` keeps activations of 1 MiB or more in pinned memory of the host, at the cost of two transfers,
            for steps on one GPU. Such steps are not replayed as CUDA graphs.
            Results are those of ``"save"``, random samples included. On a CPU and in float32, they have the same bits
            if the compiler adds in the same order, as it does in linear layers, convolutions, attention and norms. It
            may add in another order in reductions that a model writes itself and on a GPU, and round bfloat16
            elsewhere. Compilation takes longer, because dropout masks are not batched, and with ``"recompute"``
            repeated layers are compiled one by one.
            Works on the step as one traced graph, and excludes ``backend`` and ``dynamic``. Steps that take another
            route keep everything and say so.
            ``fxtrain.remat`` chooses by hand and works with any value.
        reshard: When the step of a sharded state frees whole parameters, see ``fxtrain.distributed.fsdp``.
            ``"after_forward"`` gathers each bucket of parameters, about a layer, before the forward pass uses it, and
            again before the backward pass does. This takes the least memory, and is what FSDP2 does by default.
            ``"after_backward"`` keeps each bucket from its first use to its last, as FSDP2 does with
            ``reshard_after_forward=False``, which halves the gathers. Both start the gather of a bucket where the one
            before is used, and sum a bucket of gradients to the ranks that have their parts as soon as it is complete.
            ``"off"`` gathers all parameters before the forward pass and sums all gradients after the backward pass, as
            the uncompiled step does. Results are those of ``"off"``, bitwise if the compiler rounds the same operations
            in the same way. With more than two ranks, a backend may sum in another order in other buckets. With
            ``accumulate``, each microbatch gathers and sums for itself. Works on the step as one traced graph. Steps
            that take another route gather as with ``"off"``.
        check: Whether the first two calls of each graph are checked against the uncompiled step. With ``dynamic``, the
            first call of each batch size is checked too, for up to 32 sizes. It takes memory for four more states
            while it runs. Products that round their inputs, as convolutions on a GPU do by default, are compared less
            strictly: ``torch.backends.cudnn.conv.fp32_precision``.
        artefacts: A folder for compiled graphs, which may be shared by processes and machines and may be a folder
            inside that of a run's checkpoints. A graph that is found there is loaded, so that a first step is
            as fast with an empty cache as with a full one, and gives the same bits. Otherwise one process compiles the
            graph and saves it, while others that need it wait as long as it lives. A file is loaded only if it was made
            with the same torch, fxtrain, Python, platform, processor features, number of threads and compile options.
            If one differs, the step is compiled, and one warning names it. The same holds for a damaged file. Compiled
            code can do anything that your user may do, so name only a folder whose writers you trust, as with a folder
            of Python modules. Checksums detect damage, not forgery. Only graphs of C++ kernels are saved, with fixed
            sizes and torch's own operators. A warning says if a graph is not. Requires Inductor, thus excludes
            ``backend`` and ``dynamic``.

    Returns:
        The compiled step, called like ``step``.

    Raises:
        TypeError: ``step`` is already compiled.
        ValueError: An argument is out of range, two exclude each other, or ``artefacts`` is a file. At the first call:
            ``background`` is set and ``torch.distributed`` runs several processes.
        GraphBreakError: At the first call: ``fullgraph`` is set and the step cannot be one graph.
        MiscompiledError: At one of the first calls: the result differs from that of the uncompiled step. The state
            stays valid, even with ``donate=True``.
        Exception: At the first call: the step raises it uncompiled.

    Example:
        >>> import torch, fxtrain as fx
        >>> tx = fx.optim.sgd(0.1)
        >>> step = fx.train_step(lambda model, batch: model(batch).mean(), tx)
        >>> step = fx.compile(step, backend="aot_eager", donate=True)
        >>> old = fx.init(torch.nn.Linear(2, 1), tx)
        >>> state, output = step(old, torch.ones(4, 2))
        >>> int(state.step)
        1
        >>> old.params  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        ...
        DonatedError: ...
    """
    if isinstance(step, Compiled):
        raise TypeError(f"expected a step that is not compiled, got {step!r}. Compile its .step for other options.")
    check_choice("on_recompile", on_recompile, ("warn", "error", "allow"))
    check_positive_int("steps_per_call", steps_per_call)
    if backend is None:
        check_choice("mode", mode, MODES)
    elif isinstance(backend, str) and backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise ValueError(
            f"expected backend to be a function or the name of a backend of torch.compile, got {describe(backend)}."
            f"{did_you_mean(backend, known)} torch.compiler.list_backends() lists the names."
        )
    _check_memory(memory)
    check_choice("reshard", reshard, ("after_forward", "after_backward", "off"))
    if memory != "save" and (backend is not None or dynamic):
        raise ValueError(
            f"expected memory={memory!r} without backend and dynamic, got backend={describe(backend)}, {dynamic=}. "
            "Only the traced graph of fixed sizes is analyzed. Leave these options out, or use fxtrain.remat."
        )
    pure = step if isinstance(step, Step | EvalFunction) else Step(step)
    if steps_per_call > 1 and isinstance(pure, EvalFunction):
        raise ValueError(
            f"expected steps_per_call=1 for an evaluation step, got {steps_per_call}. It is called batch by batch."
        )
    if mode == AHEAD and (backend is not None or dynamic):
        raise ValueError(
            f"expected mode={AHEAD!r} without backend and dynamic, got backend={describe(backend)}, {dynamic=}. Leave "
            "these options out, or choose another mode."
        )
    if background and (backend is not None or mode is not None or dynamic):
        raise ValueError(
            f"expected background=True without backend, mode and dynamic, got backend={describe(backend)}, {mode=}, "
            f"{dynamic=}. Only Inductor's graphs for fixed sizes are compiled in the background. Leave these options "
            "out, or compile in the foreground."
        )

    if artefacts is not None and (backend is not None or dynamic):
        raise ValueError(
            f"expected artefacts without backend and dynamic, got backend={describe(backend)}, {dynamic=}. Only "
            "Inductor's graphs for fixed sizes are saved. Leave these options out."
        )

    # Imported here, because the passes would be a tenth of the time to import fxtrain.
    from fxtrain.compiler.artefacts._folder import artefacts_in
    from fxtrain.compiler.lowering._route_order import routes_to

    folder = None if artefacts is None else artefacts_in(artefacts)

    def made(step: Step | EvalFunction, *, donate: bool, routes: Routes | None = None) -> Compiled:
        return Compiled(
            step,
            routes=routes
            or routes_to(
                backend,
                mode,
                dynamic=dynamic,
                fullgraph=fullgraph,
                memory=memory,
                reshard=reshard,
                artefacts=folder,
                runs_uncompiled=check,
            ),
            on_recompile=on_recompile,
            steps_per_call=steps_per_call,
            background=background,
            memory=memory,
            artefacts=None if folder is None else folder.folder,
            remake=made,
            donate=donate,
            dynamic=dynamic,
            check=check,
        )

    return made(pure, donate=donate and isinstance(pure, Step))


def _check_memory(memory: object) -> None:
    if memory in ("save", "recompute", "offload"):
        return
    if isinstance(memory, bool) or not isinstance(memory, int | float) or not 0 < memory <= 1:
        raise ValueError(
            f"expected memory to be 'save', 'recompute', 'offload' or a fraction in (0, 1], got {describe(memory)}. A "
            "fraction is the part of the activation memory of 'save' that the step may take."
        )
