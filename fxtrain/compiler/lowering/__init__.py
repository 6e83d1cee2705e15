"""The lowering: from a step and an example of its inputs to an executable.

``_routes`` tries, in this order: ``_trace`` (one graph), ``_specialization`` (one graph per set of values that Python
reads), ``_dynamo`` (one graph by torch.compile), ``_regions`` (graphs around the forward and backward passes) and
``uncompiled`` of ``_executable``.
"""
